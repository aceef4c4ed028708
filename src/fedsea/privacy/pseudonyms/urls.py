"""Addresses of the web: their forms, what a surrogate keeps of one, and surrogates that kept more."""

from __future__ import annotations

import re
from typing import NamedTuple

_SCHEMES = r"https?|s?ftp|file|smb|ssh|ldaps?|wss?"
_LETTERS = r"(?:[^\s<>\"'`|{}\\^]|'(?=\w))"
_ENDINGS = (
    "com|org|net|edu|gov|int|info|biz|io|eu|de|at|ch|li|lu|uk|ie|us|ca|au|nz|fr|it|nl|be|pl|cz|dk|se|no|fi|es|pt|"
    "health|clinic|hospital|berlin|hamburg|bayern|koeln|wien|swiss"
)

URL = re.compile(rf"(?:{_SCHEMES})://{_LETTERS}+|\bwww\.[\w-]+\.{_LETTERS}+", re.IGNORECASE)
URL_WITHOUT_SCHEME = re.compile(
    rf"(?<![\w@.+%/:-])(?:[\w-]{{1,63}}\.){{1,5}}(?:{_ENDINGS})(?::\d{{1,5}})?[/?#]{_LETTERS}+", re.IGNORECASE
)
"""A host and a path. Without a path it might be a sentence's end and the next one's beginning."""

_PARTS = re.compile(
    rf"(?P<scheme>(?:(?:{_SCHEMES})://)?)(?P<host>[^/?#]*?)(?P<port>(?::\d{{1,5}})?)(?P<path>(?:[/?#].*)?)",
    re.IGNORECASE | re.DOTALL,
)


class UrlParts(NamedTuple):
    """An address in parts; joined they are the address.

    Attributes:
        scheme: With its "://"; empty if what stands before that is no scheme that is known.
        host: With a user before it.
        port: With its colon.
        path: With query and fragment.
    """

    scheme: str
    host: str
    port: str
    path: str


def url_parts(url: str) -> UrlParts:
    """The parts of an address.

    >>> tuple(url_parts("https://a.org:80/b?next=https://c.org")), tuple(url_parts("www.a.org?to=http://b.org"))
    (('https://', 'a.org', ':80', '/b?next=https://c.org'), ('', 'www.a.org', '', '?to=http://b.org'))
    """
    match = _PARTS.fullmatch(url)
    assert match is not None, "the pattern takes any text"
    return UrlParts(*match.groups())


def keeps_too_much(url: str, surrogate: str) -> bool:
    """Whether a surrogate holds a part of its address, as an earlier version's may.

    There all before the last "://" was taken for the scheme, and digits that end what is before a slash for the port.

    >>> keeps_too_much("https://a.org/b?next=https://c.org/d", "https://a.org/b?next=https://mayr.example.org/x")
    True
    >>> keeps_too_much("https://a.org/b?next=https://c.org/d", "https://mayr.example.org/x?qwop=ayteh://e.sdf/i")
    False
    """
    parts = url_parts(url)
    before, slashes, behind = url.rpartition("://")
    if before and before + slashes != parts.scheme and surrogate.startswith(before + slashes):
        return True
    port = re.search(r":\d+$", behind.partition("/")[0])
    return port is not None and port.group() != parts.port and f".example.org{port.group()}" in surrogate
