"""Check digits of identifiers."""

from __future__ import annotations


def luhn_valid(digits: str) -> bool:
    """Of payment cards.

    >>> luhn_valid("4111111111111111"), luhn_valid("4111111111111112")
    (True, False)
    """
    return _luhn_sum(digits) % 10 == 0


def luhn_completed(digits: str) -> str:
    """Digits with the last one set so that they are valid.

    >>> luhn_completed("4111111111111110")
    '4111111111111111'
    """
    return digits[:-1] + str(-_luhn_sum(digits[:-1] + "0") % 10)


def _luhn_sum(digits: str) -> int:
    doubled = "0246813579"
    return sum(int(digit if number % 2 == 0 else doubled[int(digit)]) for number, digit in enumerate(reversed(digits)))


def iban_valid(iban: str) -> bool:
    """Of account numbers without spaces.

    >>> iban_valid("DE89370400440532013000"), iban_valid("DE88370400440532013000")
    (True, False)
    """
    return _mod97(iban[4:] + iban[:4]) == 1


def iban_completed(iban: str) -> str:
    """An account number with the right check digits.

    >>> iban_completed("DE00370400440532013000")
    'DE89370400440532013000'
    """
    return f"{iban[:2]}{98 - _mod97(iban[4:] + iban[:2] + '00'):02d}{iban[4:]}"


def _mod97(text: str) -> int:
    return int("".join(str(int(letter, 36)) for letter in text)) % 97
