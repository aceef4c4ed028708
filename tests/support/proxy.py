"""A TCP proxy that cuts its connections when a number of bytes has gone up."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterable


class CuttingProxy:
    """Passes bytes on between clients and a server, and breaks all connections at chosen amounts.

    Use as a context manager.

    Args:
        server: `HOST:PORT`.
        cut_after_bytes: Totals of bytes from client to server, ascending; at each, everything is reset.

    Attributes:
        refuses: Whether new connections are closed at once.
    """

    def __init__(self, server: str, cut_after_bytes: Iterable[int] = ()) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._cuts = list(cut_after_bytes)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.refuses = False
        self.num_cuts = 0
        self.num_bytes_up = 0

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            connections, self._open = self._open, set()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses:
                client.close()
                continue
            try:
                server = socket.create_connection(self._server, timeout=10.0)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            for source, sink, up in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass_on, args=(source, sink, up), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if up and self._reached(len(data)):
                    self.cut()
                    return
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _reached(self, num_bytes: int) -> bool:
        with self._lock:
            self.num_bytes_up += num_bytes
            if not self._cuts or self.num_bytes_up < self._cuts[0]:
                return False
            self._cuts.pop(0)
            self.num_cuts += 1
            return True
