"""Dates: where they are, and the same ones some days later, written as they were."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator

from fedsea.privacy.pseudonyms.typography import plain

_EN = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
       "December")  # fmt: skip
_DE = ("Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober", "November",
       "Dezember")  # fmt: skip
_EN_SHORT = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DE_SHORT = ("Jan", "Feb", "Mrz", "Apr", "Mai", "Jun", "Jul", "Aug", "Sep", "Okt", "Nov", "Dez")
_SETS = (_EN, _DE, _EN_SHORT, _DE_SHORT)
_EXTRA = {"Sept": (8, _EN_SHORT), "Maerz": (2, _DE), "Jänner": (0, _DE)}

_GAP = r"(?:\s| {2,3})"
_MONTH_NAMES = sorted({*(name for one in _SETS for name in one), *_EXTRA}, key=len, reverse=True)
_MONTH = "(?P<month>" + "|".join(f"{name}|{name.upper()}" for name in _MONTH_NAMES) + ")"
_GERMAN = _GAP + "(?:" + "|".join(f"{name}|{name.upper()}" for name in (*_DE, *_DE_SHORT, "Maerz", "Jänner")) + ")"
_DAY = r"(?P<day>0?[1-9]|[12]\d|3[01])"
_YEAR = r"(?P<year>(?:1[89]|20)\d\d)"
_TIME = r"(?P<tail>[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?)?"

_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?<![\w.-]){_YEAR}(?P<s>[-/.])(?P<mm>0?[1-9]|1[0-2])(?P=s){_DAY}(?:(?=T){_TIME})?(?![\w])",
        rf"(?<![\w.])(?P<a>\d{{1,2}})(?P<s>\.{_GAP}|[./-])(?P<b>\d{{1,2}})(?P=s){_YEAR}(?!\w)",
        r"(?<![\w.])(?P<a>\d{2})(?P<s>[./-])(?P<b>\d{2})(?P=s)(?P<yy>\d{2})(?![\w%]|[.,-]\d)",
        rf"(?<![\w.]){_DAY}(?P<th>st|nd|rd|th|\.(?={_GERMAN}))?(?P<g1>{_GAP}(?:of{_GAP})?|-){_MONTH}(?P<g2>\.?,?{_GAP}|-){_YEAR}(?!\w)",
        rf"(?<![\w.]){_DAY}(?P<th>st|nd|rd|th|\.(?={_GERMAN}))?(?P<g1>{_GAP}|-){_MONTH}(?P<g2>\.?{_GAP}['\u2019]?|-)(?P<yy>\d\d)"
        r"(?:(?<=['\u2019]\d\d)(?!\w)|(?=\s*(?:$|[;)\n]|,(?!\s?\d)|\.(?!\d)|(?:and|und|to|bis)\b)))",
        rf"(?<!\w){_MONTH}(?P<g1>\.?{_GAP}){_DAY}(?P<th>st|nd|rd|th)?(?P<g2>,?{_GAP}){_YEAR}(?!\w)",
        rf"(?<!\w){_MONTH}(?P<g2>\.?,?{_GAP}){_YEAR}(?!\w)",
        rf"(?<![\w.]){_DAY}(?P<th>st|nd|rd|th|\.(?={_GERMAN}))?(?P<g1>{_GAP}(?:of{_GAP})?){_MONTH}(?!\w)",
        rf"(?<!\w){_MONTH}(?P<g1>\.?{_GAP}){_DAY}(?P<th>st|nd|rd|th)?(?!\w)",
        r"(?<=\b[a-z]{2} )(?P<a>\d{2})\.(?P<b>\d{2})\.(?=\s[a-zäöü(])",
        r"(?<=\b[a-z]{3} )(?P<a>\d{2})\.(?P<b>\d{2})\.(?=\s[a-zäöü(])",
    )
)  # fmt: skip

# Without zeros it may be the number of a section or a version; behind these words it is a date.
_SHORT = re.compile(r"(?P<a>\d{1,2})(?P<s>[./-])(?P<b>\d{1,2})(?P=s)(?P<yy>\d{2})(?![\w%]|[.,-]\d)")
_BEFORE_SHORT = re.compile(
    r"(?i:(?<!\w)(?:geb(?:\.|oren)?(?: am)?|geburts(?:datum|tag)|born(?: on)?|D\.?O\.?B\.?|date of birth|am|vom))"
    r"\s{0,3}:?\s{0,3}(?=\d)"
)


def find_dates(text: str) -> Iterator[tuple[int, int]]:
    """Places of dates, those with more parts first."""
    for pattern in _PATTERNS:
        for match in pattern.finditer(text):
            if _parsed(match) is not None:
                yield match.start(), match.end()
    for before in _BEFORE_SHORT.finditer(text):
        short = _SHORT.match(text, before.end())
        if short is not None and _parsed(short) is not None:
            yield short.start(), short.end()


def shifted(text: str, days: int) -> str | None:
    r"""A date some days later, in the same form; None if the text is no date, or leaves the calendar.

    >>> shifted("28.02.1984", 7), shifted("March 3, 2021", -7), shifted("1. Mai", 7), shifted("7/4/2020", 14)
    ('06.03.1984', 'February 24, 2021', '8. Mai', '7/18/2020')
    >>> shifted("3.4.80", -7), shifted("1980\u201104\u201103", 7)
    ('27.3.80', '1980‑04‑10')
    """
    for pattern in (*_PATTERNS[:-2], _SHORT):
        match = pattern.fullmatch(plain(text))
        if match is not None and (parsed := _parsed(match)) is not None:
            return _moved(match, parsed, days, text)
    if match := re.fullmatch(r"(?P<a>\d{2})\.(?P<b>\d{2})\.", text):
        parsed = _parsed(match)
        return None if parsed is None else _moved(match, parsed, days, text)
    return None


def _month_of(word: str) -> tuple[int, tuple[str, ...]]:
    for names in _SETS:
        for number, name in enumerate(names):
            if word in (name, name.upper()):
                return number, names
    return next(value for name, value in _EXTRA.items() if word in (name, name.upper()))


def _parsed(match: re.Match[str]) -> tuple[dt.date, bool] | None:
    """The date, and whether the day is written before the month; 2000 stands for no year, the 1st for no day."""
    parts = match.groupdict()
    day_first = True
    if "mm" in parts:
        month, day = int(parts["mm"]), int(parts["day"])
    elif "a" in parts:
        one, two = int(parts["a"]), int(parts["b"])
        day_first = one > 12 or (parts.get("s") != "/" and two <= 12) or parts.get("s") == "."
        day, month = (one, two) if day_first else (two, one)
    else:
        month, day = _month_of(parts["month"])[0] + 1, int(parts.get("day") or 1)
    if "yy" in parts:
        year = 2000 + int(parts["yy"]) if int(parts["yy"]) < 69 else 1900 + int(parts["yy"])
    else:
        year = int(parts.get("year") or 2000)
    try:
        return dt.date(year, month, day), day_first
    except ValueError:
        return None


def _moved(match: re.Match[str], parsed: tuple[dt.date, bool], days: int, text: str) -> str | None:
    """The date, moved, in `text` as it was written: `match` is of the whole of it, in ordinary blanks and dashes."""
    parts, (date, day_first) = match.groupdict(), parsed
    if "year" not in parts and "yy" not in parts:
        date = dt.date(2000, 1, 1) + dt.timedelta((date.timetuple().tm_yday - 1 + days) % 366)
    elif "day" not in parts and "a" not in parts:
        months = date.year * 12 + date.month - 1 + round(days / 30.4375)
        date = dt.date(months // 12, months % 12 + 1, 1)
    else:
        try:
            date += dt.timedelta(days)
        except OverflowError:
            return None
    values = {"day": date.day, "mm": date.month, "year": date.year, "yy": date.year % 100}
    values |= dict(zip("ab", (date.day, date.month) if day_first else (date.month, date.day), strict=True))
    pieces, at = [], 0
    for name in sorted((name for name in parts if parts[name] is not None), key=match.start):
        if name == "month":
            new = _named(parts[name], date.month, german=parts.get("th") == ".")
        elif name == "th" and parts[name] != ".":
            new = _ordinal(date.day)
        elif name in values:
            padded = parts[name].startswith("0") or (len(parts[name]) == 2 and _pads(parts))
            new = f"{values[name]:0{len(parts[name])}d}" if padded or name == "yy" else str(values[name])
        else:
            continue
        begin, end = match.span(name)
        pieces += [text[at:begin], new]
        at = end
    return "".join([*pieces, text[at:]])


def _pads(parts: dict[str, str | None]) -> bool:
    """Whether a number of two digits is one that would have been filled up: all numbers here have two."""
    return (
        all(len(parts[name] or "00") == 2 for name in ("a", "b", "mm", "day") if name in parts) and "month" not in parts
    )


def _named(word: str, month: int, *, german: bool) -> str:
    names = _month_of(word)[1]
    if german:  # April and others are months of both languages; a full stop behind the day is German
        names = _DE if names == _EN else _DE_SHORT if names == _EN_SHORT else names
    new = names[month - 1]
    return new.upper() if word.isupper() and len(word) > 1 else new


def _ordinal(day: int) -> str:
    return "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
