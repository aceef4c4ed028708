"""Typographic blanks and dashes: copies of a text in which they are ordinary ones, letter for letter.

What is found in such a copy is at the same place of the text itself.
"""

from __future__ import annotations

import re

HYPHENS = "-\u2010\u2011\ufe63\uff0d"
"""What joins two words to one, or two groups of a number."""
_WIDE = "\u2012\u2013\u2212\ufe58"
"""Dashes that stand for a hyphen, for "to" or for a pause."""
_PAUSES = "\u2014\u2015"
_BLANKS = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"

_EVEN = str.maketrans({**dict.fromkeys(_BLANKS, " "), **dict.fromkeys(HYPHENS, "-")})
_PLAIN = {**_EVEN, **str.maketrans(dict.fromkeys(_WIDE + _PAUSES, "-"))}
_IN_NAMES = re.compile(rf"(?<=[^\W\d_])[{_WIDE}](?=[A-ZÀ-ÖØ-Þ])")
_IN_NUMBERS = re.compile(
    rf"(?<=[\w)])[{_WIDE}](?=[A-ZÀ-ÖØ-Þ\d(])|(?<=\d)[{_WIDE}{_PAUSES}](?= ?\d)|(?<=\d )[{_WIDE}{_PAUSES}](?= ?\d)"
)


def plain(text: str) -> str:
    r"""All of them ordinary.

    >>> plain("0171\u20111234\u00a0567 \u2013 x")
    '0171-1234 567 - x'
    """
    return text if text.isascii() else text.translate(_PLAIN)


def even(text: str) -> str:
    r"""Blanks and hyphens ordinary, and dashes that stand for a hyphen between names; others stay dashes.

    >>> even("Anna\u2011Lena Maier\u2013Schulz\u00a0\u2013 sie kam")
    'Anna-Lena Maier-Schulz – sie kam'
    """
    return text if text.isascii() else _IN_NAMES.sub("-", text.translate(_EVEN))


def joined(text: str) -> str:
    r"""An even text in which dashes between the groups of numbers and codes are ordinary hyphens too.

    >>> joined("0171\u20131234567 \u2013 sie kam")
    '0171-1234567 – sie kam'
    """
    return text if text.isascii() else _IN_NUMBERS.sub("-", text)
