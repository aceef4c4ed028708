"""When the authority renews a client's certificate without its operator."""

from __future__ import annotations

from datetime import datetime

from fedsea.errors import AuthError
from fedsea.wire.identity.journal import Entry, Record
from fedsea.wire.identity.requests import SigningRequest

RENEWAL_SHARE = 1 / 2
"""A certificate may be renewed once less than this share of its life remains; clients ask at a third."""

MOST_RENEWALS = 8
"""Certificates that one certificate may ask for, so that a client gone wild cannot fill the journal."""


def check_renewal(record: Record, name: str, serial: str, request: SigningRequest, now: datetime) -> Entry | None:
    """Decide on a request that came over a connection with the certificate `serial` of `name`.

    Returns:
        The certificate that answered the same request before, or None: a new one may be issued.

    Raises:
        AuthError: The certificate is unknown, expired or revoked, the request is for another name, or it is too
            early or too often.
    """
    current = record.entries.get(serial)
    if current is None or current.name != name:
        raise AuthError(f"The authority's journal does not know the certificate of {name}: enrol again.")
    if current.revoked is not None or name in record.revoked_names:
        raise AuthError(f"The certificate of {name} was revoked: ask the operator to approve a new request.")
    if now > current.not_after:
        raise AuthError(f"The certificate of {name} has expired: enrol again and have the operator approve it.")
    if request.name != name:
        raise AuthError(f"{name} asked for a certificate of another name: a renewal keeps the name.")
    renewals = record.renewals(current)
    for entry in renewals:
        if entry.key == request.fingerprint:
            return entry
    early = current.not_after - now > (current.not_after - current.not_before) * RENEWAL_SHARE
    if early or len(renewals) >= MOST_RENEWALS:
        raise AuthError(
            f"The certificate of {name} is not renewed now: a client renews it in the last third of its life; for a "
            "new key before that, enrol again and have the operator approve it."
        )
    return None
