"""Identifiers that have a form: e-mail, phone, account, card and record numbers, addresses, URLs."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from itertools import chain

from fedsea.privacy.pseudonyms.checksums import iban_valid, luhn_valid
from fedsea.privacy.pseudonyms.lexicon import Lexicon, missing
from fedsea.privacy.pseudonyms.spans import Span
from fedsea.privacy.pseudonyms.urls import URL, URL_WITHOUT_SCHEME

_EMAIL = re.compile(
    r"(?:(?<![\w.+%-])[\w.+%-]{1,64}|\"[^\"\s@][^\"\n@]{0,62}\")"
    r"@(?:(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}|\[[\w.:]{3,45}\])"
)
_CLOSING = ".,;:!?)]'"
"""What ends a sentence or a bracket rather than an address of the net."""
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_GAP = r"(?:\s| {2,3})"
_JOIN = r"(?:[ -]| {2,3})?"
_IBAN = re.compile(rf"(?<!\w)[A-Z]{{2}}\d{{2}}(?:{_JOIN}[A-Z0-9]{{4}}){{2,7}}(?:{_JOIN}[A-Z0-9]{{1,3}})?(?!\w)")
_IBAN_SMALL = re.compile(
    rf"(?<!\w)[A-Za-z]{{2}}\d{{2}}{_JOIN}[A-Za-z0-9]{{4}}(?:{_JOIN}\d{{4}}){{1,6}}(?:{_JOIN}\d{{1,3}})?(?!\w)"
)
"""In small letters, where words of four letters may follow."""
_CARD = re.compile(r"(?<![\w-])(?:\d(?:[ -]?\d){12,18}|\d{4}(?: {1,3}\d{4}){3})(?![\w-])")
_SSN = re.compile(r"(?<![\w-])(?!000|666)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_INSURANCE = re.compile(
    r"(?<!\w)(?:[A-Z]\d{9}|\d{2} {0,2}(?:0[1-9]|[12]\d|3[01])(?:0[1-9]|1[0-2])\d{2} {0,2}[A-Z] {0,2}\d{3})(?!\w)"
)
_PLATE = re.compile(
    r"(?<![\w-])(?!HLA|SARS|COV|CYP|CD|IL|HER|HPV|ICD|ASA|PD)[A-ZÄÖÜ]{1,3}-[A-Z]{1,2} {0,2}\d{1,4}[EH]?(?![\w-])"
)

# Every optional part begins with something else than space: a long gap can be matched in one way only.
_IS = r"\s*(?:(?:is|ist|lautet|was|war)\s*)?(?:[:#=]\s*)?"
_CODE_LETTERS = r"[A-Za-z0-9][\w./-]*\d[\w/-]*|\d"
_CODE = rf"(?P<code>{_CODE_LETTERS})"
_UNIT = r" ?(?:[%€]|(?:mg|µg|kg|g|ml|l|IE|IU|mmol|cm|mm|Uhr|EUR|Euro)\b)"
_GROUPS = rf"\d{{2,4}}(?: \d{{3,4}}){{1,4}}(?![\w/-]|[.,:]\d|{_UNIT})"
_COURT_FILE = r"(?:[IVX]{1,5} )?\d{1,4} ?[A-Za-z]{1,5} ?\d{1,6}/\d{2,4}"
"""As in 12 Js 345/21."""
_NUMBER = r"[- .]?(?:number|nummer|no\.?|nr\.?|id|#)"


def _after(words: str, code: str = _CODE) -> re.Pattern[str]:
    return re.compile(rf"(?i:\b(?:{words})){_IS}{code}(?!\w)")


_RECORD = _after(
    rf"MRN|(?:medical |health )?record{_NUMBER}|(?:patient(?:en)?|fall|case|chart|account|kunden?|customer|member|"
    rf"policy|police?n|versicherten|mitglieds?|akten|auftrags?|rechnungs?|invoice|employee|personal|order|encounter|visit|"
    rf"proben?|sample|specimen|accession){_NUMBER}|aktenzeichen|az\.|ref\.|referenz|KVNR|pat\.-?(?:nr|id)\.?",
    rf"(?P<code>{_COURT_FILE}|{_GROUPS}|{_CODE_LETTERS})",
)
# Without a sign between, ID may be Idaho before a postal code.
_ID = re.compile(r"(?i:\bID)(?:\s?[:#=]|[ -](?:Nr|No)\.?:?|\sis\b)\s?(?P<code>(?=[\w./-]{4})[\w./-]*\d[\w/-]*)(?!\w)")
_SOCIAL = _after(
    rf"SSN|social security(?:{_NUMBER})?|tax{_NUMBER}|tax id|steuer-?id(?:nr\.?|entifikationsnummer)?|"
    rf"steuer{_NUMBER}|sozialversicherungs{_NUMBER}|SV-?{_NUMBER}|krankenversicherten{_NUMBER}|NHS{_NUMBER}",
    r"(?P<code>[A-Z]?\d[\d /-]*\d(?: ?[A-Z] ?\d{3})?)",
)
_PASSPORT = _after(
    rf"passport(?:{_NUMBER})?|(?:reise)?pass{_NUMBER}|reisepass|(?:personal)?ausweis(?:{_NUMBER})?|"
    rf"identity card(?:{_NUMBER})?|ID card(?:{_NUMBER})?|(?:driver'?s|driving) licen[cs]e(?:{_NUMBER})?|"
    rf"führerschein(?:{_NUMBER})?",
    r"(?P<code>(?=[A-Za-z0-9]*\d)[A-Za-z0-9]{6,14})",
)
_PLATE_NEAR = _after(
    rf"licen[cs]e plate(?:{_NUMBER})?|number plate|plate(?:{_NUMBER})?|(?:amtliches |kfz-)?kennzeichen",
    r"(?P<code>(?=[A-ZÄÖÜ0-9 -]{0,9}\d)(?=[\d -]{0,8}[A-ZÄÖÜ])[A-ZÄÖÜ0-9](?:[ -]?[A-ZÄÖÜ0-9]){4,8})",
)
_PHONE_NEAR = _after(
    r"tel(?:efon|ephone)?(?:nummer|\.|:)?|phone(?: number)?|mobil(?:e|nummer|telefon)?|handy(?:nummer)?|"
    r"cell(?: phone)?|fax(?:nummer)?|durchwahl|call(?: (?:him|her|them|us|me|back))?(?: (?:on|at))?|"
    r"rückruf(?: unter)?|reach(?:ed|able)? (?:on|at)|erreichbar unter|unter der nummer|unter(?= \(?[+0])",
    r"(?P<code>(?:\+|\(\+?)?\d[\d ()/.-]{4,20}\d(?:\s?(?:x|ext\.?)\s?\d{1,5})?)",
)  # fmt: skip
_PHONE_FORM = re.compile(
    r"(?<![\w.-])(?:\+\d{1,3}[ -]?(?:\(0\) ?)?\(?\d{1,5}\)?(?:[ /.-]?\d{2,5}){1,4}|"
    r"(?:\+?1[ .-])?(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4}|\(0\d{2,5}\) ?\d{4,9})"
    r"(?:\s?(?:x|ext\.? ?)\d{1,5})?(?![\w-])"
)  # fmt: skip
_PHONE_CANDIDATE = re.compile(r"(?<![\w.-])(?:\+|\(?0)[\d(][\d ()/.-]{4,22}\d(?!\w)")
_REGIONS = {"de": ("DE", "AT", "CH"), "en": ("US", "GB")}

_NAME_DE = r"[A-ZÄÖÜ][a-zäöüß]{1,30}"
_NAMES_DE = rf"{_NAME_DE}(?:-{_NAME_DE}){{0,3}}"
_HOUSE_DE = _GAP + r"\d{1,4}\s?(?:[a-z](?!\w))?(?:\s?[-/]\s?\d{1,4}\s?[a-z]?(?!\w))?"
_STREET_DE = re.compile(
    rf"(?<![\w-])(?:(?:{_NAME_DE}[- ]){{0,4}}?(?:[A-ZÄÖÜ][a-zäöüß]{{0,30}}(?:"
    rf"straße|strasse|str\.|weg|platz|allee|gasse|"
    rf"ring|damm|ufer|chaussee|steig|stieg|markt|graben|promenade|zeile|pfad|kamp|twiete|höhe|berg|garten)|"
    rf"Straße|Strasse|Str\.|Weg|Platz|Allee|Gasse|Ring|Damm|Ufer|Chaussee)"
    rf"|(?:Am|An der|An den|Im|In der|In den|Zum|Zur|Auf dem|Auf der|Unter den|Hinter dem|Bei der)"
    rf"(?:{_GAP}{_NAMES_DE}){{1,2}}){_HOUSE_DE}(?!\w|[.,]\d)"
)  # fmt: skip
_TOWN_DE = re.compile(
    rf"(?<![\w.,-])(?:D-|A-|CH-)?\d{{4,5}}{_GAP}(?P<town>(?:(?:Bad|Sankt|St\.|Markt|Neu|Alt|Groß|Klein){_GAP})?{_NAMES_DE}"
    rf"(?:{_GAP}(?:am|an der|im|in der|bei|ob der|vor der|a\.){_GAP}{_NAMES_DE}|\s\([A-Z][a-z]+\)|/{_NAMES_DE})?)(?!\w)"
)  # fmt: skip
_SUFFIX_EN = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Drive|Dr|Lane|Ln|Court|Ct|Place|Pl|Square|Sq|Terrace|Way|Parkway|Pkwy|Circle|"
    "Highway|Hwy|Trail|Alley|Crescent|Close|Mews|Grove|Gardens|Walk|Hill|Row|Plaza"
)
_STREET_EN = re.compile(
    rf"(?<![\w.-])\d{{1,6}}[A-Za-z]?{_GAP}(?:[NSEW]\.?{_GAP})?(?:(?:[A-Z][\w'\u2019-]*|St\.|Mt\.){_GAP}){{1,4}}?(?:SUFFIX)\b\.?"
    rf"(?:,?{_GAP}(?:(?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor)\b\.?|#)\s?\w+)?(?!\w)"
)  # fmt: skip
_BOX = re.compile(r"(?<!\w)(?:P\.?\s?O\.?\s?Box|Postfach)\s{1,3}\d[\d ]*\d?(?!\w)")
_STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK|OR|PA|"
    "RI|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY|DC|PR|VI|GU|AS|MP|FM|MH|PW|AA|AE|AP"
)
_TOWN_EN = re.compile(
    rf"(?<!\w)(?P<town>(?:[A-Z][\w'\u2019.-]{{1,30}}{_GAP}){{0,2}}[A-Z][\w'\u2019.-]{{1,30}}),?{_GAP}(?:{_STATES}){_GAP}\d{{5}}(?:-\d{{4}})?(?!\w|-\d)"
)
_TOWN_GB = re.compile(rf"(?<!\w)(?:[A-Z][\w'\u2019-]+,?{_GAP}){{0,2}}[A-Z]{{1,2}}\d[A-Z\d]?{_GAP}\d[A-Z]{{2}}(?!\w)")


class PatternRecogniser:
    """Finds identifiers by their form, and, where forms are plain numbers, by the words before them.

    Args:
        languages: Whose addresses and phone numbers are known.
        lexicon: For towns.

    Raises:
        ConfigError: phonenumbers is not installed.
    """

    def __init__(self, languages: tuple[str, ...], lexicon: Lexicon) -> None:
        try:
            import phonenumbers
        except ModuleNotFoundError:
            raise missing() from None
        self._phonenumbers = phonenumbers
        self._regions = [region for language in languages for region in _REGIONS[language]]
        self._lexicon = lexicon
        suffixes = "|".join(sorted({*_SUFFIX_EN.split("|"), *lexicon.streets}, key=len, reverse=True))
        self._street_en = re.compile(_STREET_EN.pattern.replace("SUFFIX", suffixes))

    def find(self, text: str) -> Iterator[Span]:
        """Candidates, the surest first; they may overlap."""
        yield from _all(URL, text, "url", trailing=_CLOSING)
        yield from _all(_EMAIL, text, "email", trailing=".")
        yield from _all(URL_WITHOUT_SCHEME, text, "url", trailing=_CLOSING)
        if any(letter.isdigit() for letter in text):
            yield from self._numbers(text)

    def _numbers(self, text: str) -> Iterator[Span]:
        for match in chain(_IBAN.finditer(text), _IBAN_SMALL.finditer(text)):
            if iban_valid(re.sub(r"[\s-]", "", match.group()).upper()) or "iban" in text[: match.start()][-12:].lower():
                yield Span(match.start(), match.end(), "iban")
        for match in _CARD.finditer(text):
            if luhn_valid(re.sub(r"[ -]", "", match.group())):
                yield Span(match.start(), match.end(), "card")
        yield from _coded(_SOCIAL, text, "ssn")
        yield from _all(_SSN, text, "ssn")
        yield from _coded(_PASSPORT, text, "passport")
        yield from _coded(_RECORD, text, "record")
        yield from _coded(_ID, text, "record")
        yield from _all(_INSURANCE, text, "ssn")
        for pattern in (_IPV4, _IPV6):
            yield from (span for span in _all(pattern, text, "ip") if _is_address(text[span.start : span.end]))
        yield from self._addresses(text)
        yield from _coded(_PHONE_NEAR, text, "phone")
        for match in _PHONE_CANDIDATE.finditer(text):
            if end := self._number_end(match.group()):
                yield Span(match.start(), match.start() + end, "phone")
        yield from _all(_PHONE_FORM, text, "phone")
        yield from _coded(_PLATE_NEAR, text, "plate")
        yield from _all(_PLATE, text, "plate")

    def _number_end(self, text: str) -> int:
        """How much of a text, group by group, is a phone number that exists somewhere; 0: none of it."""
        regions: list[str | None] = [None] if text.startswith("+") else list(self._regions)
        while len(text) > 6:
            for region in regions:
                try:
                    number = self._phonenumbers.parse(text, region)
                except self._phonenumbers.NumberParseException:
                    continue
                if self._phonenumbers.is_valid_number(number):
                    return len(text)
            shorter = re.match(r".*\d(?=\D+\d+\D*$)", text, re.DOTALL)
            if shorter is None:
                return 0
            text = shorter.group()
        return 0

    def _addresses(self, text: str) -> Iterator[Span]:
        streets = [
            *_all(self._street_en, text, "address"),
            *_all(_STREET_DE, text, "address"),
            *_all(_BOX, text, "address"),
        ]
        yield from streets
        yield from _towns(_TOWN_EN, text)
        ends = {span.end for span in streets}
        for match in _TOWN_DE.finditer(text):
            before = len(text[: match.start()].rstrip(" ,\n\u2013-"))
            if any(word.lower() in self._lexicon.cities for word in match["town"].split()) or before in ends:
                yield Span(match.start(), match.end(), "address")
        yield from _towns(_TOWN_GB, text)


def _all(pattern: re.Pattern[str], text: str, kind: str, trailing: str = "") -> Iterator[Span]:
    for match in pattern.finditer(text):
        found = match.group().rstrip(trailing) if trailing else match.group().rstrip()
        yield Span(match.start(), match.start() + len(found), kind)


def _towns(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    """Towns with their codes; then without their first words, should those belong to a street."""
    for match in pattern.finditer(text):
        yield Span(match.start(), match.end(), "address")
        for space in re.finditer(r"\s+", match.group()):
            yield Span(match.start() + space.end(), match.end(), "address")


def _coded(pattern: re.Pattern[str], text: str, kind: str) -> Iterator[Span]:
    for match in pattern.finditer(text):
        code = match["code"].rstrip("./- (")
        if code:
            yield Span(match.start("code"), match.start("code") + len(code), kind)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
