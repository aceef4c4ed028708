"""Keeps a client's certificate fresh while it works."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

from fedsea.errors import FedseaError
from fedsea.wire.channel import call_renew
from fedsea.wire.identity.certificates import utc_now
from fedsea.wire.identity.enrollment import begin_renewal, finish_renewal
from fedsea.wire.identity.identity import Identity, needs_renewal

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 600.0


class IdentityKeeper:
    """An identity that is renewed at the server when a third of its life is left.

    As a context manager it looks every ten minutes, in a thread. A server that does not renew is no error as long as
    the certificate is valid.

    Args:
        folder: Identity folder.
        server: `HOST:PORT`.
    """

    def __init__(self, folder: Path, server: str) -> None:
        self._server = server
        self._identity = Identity.load(folder)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fedsea-renewal", daemon=True)

    def current(self) -> Identity:
        """The newest identity."""
        return self._identity

    def __enter__(self) -> IdentityKeeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=30.0)

    def _work(self) -> None:
        while True:
            if needs_renewal(self._identity, utc_now()):
                self.renew()
            if self._over.wait(_LOOK_EVERY_S):
                return

    def renew(self) -> None:
        """Ask for a new certificate now; a refusal is logged."""
        try:
            request = begin_renewal(self._identity)
            answer = asyncio.run(call_renew(self._server, self._identity, request))
            self._identity = finish_renewal(self._identity, answer)
            log.info("the certificate was renewed; it is valid until %s", f"{self._identity.not_after:%Y-%m-%d %H:%M}")
        except FedseaError as error:
            log.warning("The certificate could not be renewed: %s", error.message)
