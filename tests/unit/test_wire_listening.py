"""Addresses to listen on: one form for the clients' and for the metrics'."""

from __future__ import annotations

import pytest

from fedsea.errors import ConfigError
from fedsea.wire.listening import split_listen


@pytest.mark.parametrize(
    ("listen", "parts"),
    [
        ("0.0.0.0:7443", ("0.0.0.0", 7443)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:9464", ("::1", 9464)),
        ("[::]:65535", ("::", 65535)),
    ],
)
def test_an_address_to_listen_on_has_a_host_and_a_port(listen: str, parts: tuple[str, int]) -> None:
    assert split_listen(listen) == parts


@pytest.mark.parametrize(
    "listen", ["9464", ":9464", "127.0.0.1:x", "127.0.0.1:70000", "::1:7443", "[]:1", "[::1]", "", "h:-1", "h:²"]
)
def test_what_is_no_address_to_listen_on_is_refused_by_what_it_is_for(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"no address for metrics.* 127\.0\.0\.1:9464"):
        split_listen(listen, "for metrics", "127.0.0.1:9464")
