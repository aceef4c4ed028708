"""What a client replaces in its text before anything is tokenised. It never leaves the client."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from fedsea.plan.sections import Flag, Section

IdentifierType = Literal[
    "name", "email", "phone", "address", "date", "iban", "card", "ssn", "record", "passport", "plate", "url", "ip"
]
IDENTIFIER_TYPES: tuple[IdentifierType, ...] = get_args(IdentifierType)


def _compiles(pattern: str) -> str:
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no regular expression ({error}); mend it") from None
    if found.match(""):
        raise ValueError("matches the empty text, and so everywhere; ask for at least one character")
    return pattern


_Pattern = Annotated[str, AfterValidator(_compiles)]
_PatternName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
_Phrase = Annotated[str, Field(min_length=2, max_length=200)]


class PseudonymSettings(Section):
    """The table `[pseudonyms]` of a client's settings. Relative paths begin at the settings file.

    Attributes:
        enabled: Replace identifiers in training rows and prompts, and put them back in answers.
        mapping: File that keeps, encrypted, which surrogate stands for what. All runs of this client share it.
        key: File with the key of the mapping (readable by its owner alone); "" takes the mapping's name and `.key`.
        passphrase: Take the key from a passphrase instead, in FEDSEA_PSEUDONYMS_PASSPHRASE.
        types: What is looked for.
        languages: Languages whose names, dates and addresses are known.
        patterns: Name to regular expression: the client's own identifiers, such as badge numbers.
        words: Words and phrases that are always replaced, in any case; inside a longer identifier with all of it.
        word_files: Files of such words, one a line.
        name_files: Files of names that are always replaced as names (patients, staff), one word or full name a line.
        keep: Words that look like identifiers and are none: not replaced, but for those inside a longer identifier
            (an e-mail address, a street).
        restore: Which surrogates become originals again in an answer: "all" that this client ever gave out, or only
            those of the "prompt".
    """

    enabled: Flag = False
    mapping: str = "pseudonyms.map"
    key: str = ""
    passphrase: Flag = False
    types: tuple[IdentifierType, ...] = IDENTIFIER_TYPES
    languages: tuple[Literal["de", "en"], ...] = Field(("de", "en"), min_length=1)
    patterns: dict[_PatternName, _Pattern] = Field(default_factory=dict)
    words: tuple[_Phrase, ...] = ()
    word_files: tuple[str, ...] = ()
    name_files: tuple[str, ...] = ()
    keep: tuple[_Phrase, ...] = ()
    restore: Literal["all", "prompt"] = "all"
