"""Who may talk to the server: the gate that every connection passes, and passes again while it lives.

TLS has proven that the peer holds the key of a certificate that the CA signed. The gate adds what TLS cannot know:
that it is a client's certificate, that the journal names it and nobody revoked it, that it has not expired since the
connection began, and that the client is on the allow-list.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

from fedsea.errors import AuthError, FedseaError, TransportError
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity.certificates import Clock, Role
from fedsea.wire.identity.files import disk_errors, read_file
from fedsea.wire.identity.folder import CA_FILE
from fedsea.wire.identity.journal import FILE_NAME, Record, read_journal

LOOK_EVERY_S = 1.0
_MOST_CACHED = 1024
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """A client or relay that the gate admits.

    Attributes:
        name: From its certificate.
        serial: Serial number in hex.
        not_after: When the certificate ends; `check` refuses it from then on.
        role: Client or relay.
    """

    name: str
    serial: str
    not_after: datetime
    role: Role = Role.CLIENT


class PeerRefused(AuthError):  # noqa: N818 (what happened to whom, not what went wrong here)
    """The gate does not admit a client that it knows by name.

    Attributes:
        name: From its certificate.
        reason: A word or two for the server's operator.
    """

    def __init__(self, message: str, name: str, reason: str) -> None:
        super().__init__(message)
        self.name, self.reason = name, reason


class PeerGate:
    """Admits clients whose certificate is issued, unrevoked, unexpired and allowed.

    Args:
        folder: The authority's folder, or a copy of its `ca.pem` and `journal.jsonl`; the CA's key is not needed.
        allowed: Names that may connect, a file with one name a line (`#` begins a comment), or None for all approved.
        clock: Gives the time, for expiry.
        monotonic: Gives seconds; files are looked at once in `LOOK_EVERY_S` at most.

    Raises:
        ConfigError: The folder has no authority.
        StorageError: The journal is missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        allowed: Collection[str] | Path | None = None,
        *,
        clock: Clock = certs.utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        pem = read_file(folder / CA_FILE, "make an authority with `fedsea ca init`, or give its folder (--ca).")
        self._ca = certs.certificate_from_pem(pem, str(folder / CA_FILE))
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._read_certificates: dict[bytes, PeerIdentity] = {}
        self._record: _Watched[Record] = _Watched(folder / FILE_NAME, read_journal)
        self._names = frozenset(allowed) if allowed is not None and not isinstance(allowed, Path) else None
        self._names_file = _Watched(allowed, _read_names) if isinstance(allowed, Path) else None
        self._looked_at = monotonic()

    def check(self, certificate_pem: bytes) -> PeerIdentity:
        """Admit or refuse a peer; cheap enough to be called for every message.

        Args:
            certificate_pem: The certificate of the connection, which TLS has verified.

        Raises:
            AuthError: The peer must not take part; its connection is to be closed.
            TransportError: The certificate ran out while connected, but was renewed: the peer is to connect again.
        """
        peer, record, names = self._known(certificate_pem)
        if peer.role is not Role.CLIENT:
            raise AuthError("A relay passes sealed streams on and takes no part itself: enrol a client for that.")
        self._check_journal(peer, record)
        if names is not None and peer.name not in names:
            raise PeerRefused(
                f"{peer.name} is not on the server's list of clients: ask the operator to add it to the plan.",
                peer.name,
                "not on the list",
            )
        return peer

    def check_relay(self, certificate_pem: bytes) -> PeerIdentity:
        """Admit or refuse a relay, by the journal alone; the clients behind it are checked by `check`.

        Raises:
            AuthError: It must not carry streams, or not any more.
        """
        peer, record, _ = self._known(certificate_pem)
        if peer.role is not Role.RELAY:
            raise AuthError("This certificate is not a relay's.")
        self._check_journal(peer, record)
        return peer

    def barred(self, name: str) -> str:
        """Why a client of this name would be turned away, in a word, even if it never came; "" if it would not be."""
        with self._lock:
            self._look()
            record = self._record.value
        if record is None:
            return ""
        entries = record.named(name)
        usable = [entry for entry in entries if entry.revoked is None]
        if name in record.revoked_names or (entries and not usable):
            return "revoked"
        return "expired" if usable and all(self._clock() > entry.not_after for entry in usable) else ""

    def _known(self, certificate_pem: bytes) -> tuple[PeerIdentity, Record, frozenset[str] | None]:
        with self._lock:
            self._look()
            peer = self._read_certificates.get(certificate_pem) or self._read_peer(certificate_pem)
            record = self._record.value
            names = self._names_file.value if self._names_file else self._names
        if record is None or (self._names_file and names is None):
            raise AuthError("The server cannot read its list of clients, so it admits nobody: tell the operator.")
        return peer, record, names

    def _check_journal(self, peer: PeerIdentity, record: Record) -> None:
        entry = record.entries.get(peer.serial)
        if entry is None or entry.name != peer.name:
            raise PeerRefused(
                f"The server's journal does not know the certificate of {peer.name}: ask the operator to approve a new "
                f"request (`fedsea enroll --name {peer.name} --again`).",
                peer.name,
                "not in the journal",
            )
        if entry.revoked is not None or peer.name in record.revoked_names:
            if peer.role is Role.RELAY:
                raise PeerRefused(
                    f"The certificate of the relay {peer.name} was revoked, so nothing passes through it: its owner "
                    "has to ask the operator why, and for a new one; there is nothing to be done at a client.",
                    peer.name,
                    "revoked",
                )
            raise PeerRefused(
                f"The certificate of {peer.name} was revoked: ask the operator why, and to approve a new request "
                f"(`fedsea enroll --name {peer.name} --again`) if you are to take part again.",
                peer.name,
                "revoked",
            )
        if self._clock() > peer.not_after:
            if record.successor(entry) is not None:
                raise TransportError(
                    f"The certificate of this connection of {peer.name} has run out and was renewed: reconnect."
                )
            raise PeerRefused(
                f"The certificate of {peer.name} expired on {peer.not_after:%Y-%m-%d %H:%M} UTC: run `fedsea enroll "
                "--again` and send the request to the operator.",
                peer.name,
                "expired",
            )

    def _read_peer(self, certificate_pem: bytes) -> PeerIdentity:
        certificate = certs.certificate_from_pem(certificate_pem, "What the peer sent")
        if not certs.is_issued_by(certificate, self._ca):
            raise AuthError(
                "The peer's certificate is of another authority: enrol with the operator of this federation."
            )
        relay = certs.role_of(certificate) is Role.RELAY
        peer = PeerIdentity(
            certs.relay_name(certificate) if relay else certs.client_name(certificate),
            certs.serial_text(certificate),
            certificate.not_valid_after_utc,
            Role.RELAY if relay else Role.CLIENT,
        )
        if len(self._read_certificates) >= _MOST_CACHED:
            self._read_certificates.clear()
        self._read_certificates[certificate_pem] = peer
        return peer

    def _look(self) -> None:
        now = self._monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        self._record.look()
        if self._names_file is not None:
            self._names_file.look()


class _Watched(Generic[T]):
    """A file's content, read again when the file changed; None while it cannot be read."""

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        self.path = path
        self.value: T | None = None
        self._read = read
        self._seen: tuple[int, int, int] | None = None
        with disk_errors("read", path):
            self._load(path.stat())

    def look(self) -> None:
        """Read the file if it changed, or could not be read last time."""
        try:
            state = self.path.stat()
            if self.value is None or _state(state) != self._seen:
                self._load(state)
        except (OSError, FedseaError) as error:
            if self.value is not None or self._seen is not None:
                _LOG.error("No client is admitted until this is mended: %s", error)
            self.value = self._seen = None

    def _load(self, state: os.stat_result) -> None:
        # The state is from before the reading: a change during it is seen at the next look.
        self.value = self._read(self.path)
        self._seen = _state(state)


def _state(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_size, state.st_mtime_ns


def _read_names(path: Path) -> frozenset[str]:
    text = read_file(path, "write the names of the clients that may connect into it, one a line.")
    lines = (line.partition("#")[0].strip() for line in text.decode(errors="replace").splitlines())
    return frozenset(certs.check_name(line) for line in lines if line)
