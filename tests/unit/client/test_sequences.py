"""Sequences give back what they took, whatever becomes of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fedsea.client.decoding import _cut
from fedsea.client.local_trunk import LocalTrunk
from fedsea.errors import ConfigError
from fedsea.server.batches import SMALL_TURN
from tests.support.opened import open_local, pages


def test_caches_here_are_given_back_when_the_trunk_opens_no_session(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_local(base_model)

    def refuse(*_: Any) -> None:
        raise ConfigError("No sessions here.")

    monkeypatch.setattr(LocalTrunk, "open_session", refuse)
    with pytest.raises(ConfigError, match="No sessions here"):
        opened.decoder.open(8, num_sequences=2)
    assert pages(opened) == [0, 0, 0]


def test_messages_are_never_larger_than_the_server_takes_of_a_session_with_so_many_sequences():
    rng = random.Random(3)
    for _ in range(500):
        most, count = rng.randint(1, 40), rng.randint(1, 12)
        lengths = [rng.randint(0, rng.choice((1, 1, 16, 60))) for _ in range(count)]
        if not any(lengths):
            continue
        pieces = [[stop - start for start, stop in spans] for spans in _cut(lengths, most)]
        assert [sum(piece[at] for piece in pieces) for at in range(count)] == lengths
        assert max(map(sum, pieces)) <= max(most, SMALL_TURN * count)
