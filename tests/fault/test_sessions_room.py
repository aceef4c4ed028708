"""Room at a real server: it comes back from whoever goes away, and goes to whoever waits; no page is left."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedsea.client.decoding import SplitDecoder
from fedsea.server import admission, line
from tests.support.decoding import DEADLINE_S, answer, central, comes_back_to, decoding, held, prompt_of
from tests.support.federation import Federation
from tests.support.proxy import CuttingProxy

NONE = (0, 0, 0)
MANY = 8
"""Sequences of 128 tokens: the server has room for two sessions of so many."""
PROMPT = prompt_of(5)


@pytest.fixture
def full(federation) -> Federation:
    """A server with little room, and a lease that does not end before the test."""
    fed = federation("a", "b", inference={"prefill_tokens": 8, "kv_memory_mb": 1, "max_tokens": 128})
    fed.start_server()
    return fed


def test_sessions_that_are_closed_while_the_connection_is_away_end_when_it_is_back(full, base_model):
    with CuttingProxy(full.address) as proxy, decoding(full, through=proxy.address) as decoder:
        sequences = [decoder.open(20) for _ in range(3)]
        for one in sequences:
            one.extend([PROMPT])
        before = held(full)
        proxy.refuses = True
        proxy.cut()
        for one in sequences:
            one.close()
        assert held(full) == before
        proxy.refuses = False
        assert comes_back_to(full, NONE)
        assert answer(decoder, PROMPT, 3) == central(base_model, PROMPT, 3)
        assert comes_back_to(full, NONE)


def several(decoder: SplitDecoder) -> list[int]:
    """The next token after the prompt, from a session that takes half of the room."""
    with decoder.open(128, MANY) as sequences:
        return sequences.extend([PROMPT] * MANY).argmax(-1).tolist()


def test_everybody_is_served_while_some_wait_in_vain_and_others_go_away(full, base_model, monkeypatch):
    monkeypatch.setattr(line, "BACK_WITHIN_S", 0.5)
    expected = central(base_model, PROMPT, 1) * MANY
    with (
        CuttingProxy(full.address) as proxy,
        decoding(full, "a") as one,
        decoding(full, "b") as other,
        decoding(full, "b", through=proxy.address) as leaving,
        ThreadPoolExecutor(8) as pool,
    ):
        first = [one.open(128, MANY) for _ in range(2)]
        for sequences in first:
            sequences.extend([PROMPT] * MANY)
        waits = leaving.open(128, MANY)
        going = [pool.submit(several, (one, other)[number % 2]) for number in range(8)]
        proxy.refuses = True
        proxy.cut()
        waits.close()
        for sequences in first:
            sequences.close()
        assert [one.result(DEADLINE_S) for one in going] == [expected] * 8
        proxy.refuses = False
    assert comes_back_to(full, NONE)


def test_answer_beyond_its_clients_share_makes_room_while_it_pauses_and_goes_on_with_the_same_tokens(
    full, base_model, monkeypatch
):
    monkeypatch.setattr(admission, "OWED_AFTER_S", 0.2)
    with decoding(full, "a") as greedy, decoding(full, "b") as modest, contextlib.ExitStack() as stack:
        pausing = [stack.enter_context(greedy.open(128, MANY)) for _ in range(2)]
        texts = [PROMPT] * MANY
        for sequences in pausing:
            sequences.extend(texts)
        before = held(full)
        with modest.open(128, MANY) as sequences:
            sequences.extend(texts)
            assert held(full) == before
        expected = central(base_model, PROMPT, 2)
        for sequences in pausing:
            assert sequences.extend([expected[:1]] * MANY).argmax(-1).tolist() == expected[1:] * MANY
        assert sorted(sequences.session.num_replays for sequences in pausing) == [0, 1]
    assert comes_back_to(full, NONE)


def test_answers_in_use_beyond_their_clients_share_go_on_when_one_had_to_make_room(full, base_model, monkeypatch):
    monkeypatch.setattr(admission, "OWED_IN_USE_AFTER_S", 0.2)
    monkeypatch.setattr(admission, "OWED_AFTER_S", 0.2)
    new = 8
    expected = central(base_model, PROMPT, new)

    def speak(sequences) -> list[int]:
        logits, said = sequences.extend([PROMPT] * MANY), []
        while True:
            tokens = logits.argmax(-1).tolist()
            assert len(set(tokens)) == 1
            if len(said) == 3 and not served.is_set():
                begun.release()
                sequences.rollback([len(PROMPT) + 2] * MANY)
            else:
                said.append(tokens[0])
            if len(said) == new:
                sequences.close()
                return said
            logits = sequences.extend([said[-1:]] * MANY)

    served = threading.Event()
    begun = threading.Semaphore(0)
    with decoding(full, "a") as greedy, decoding(full, "b") as modest, ThreadPoolExecutor(2) as pool:
        speaking = [greedy.open(128, MANY) for _ in range(2)]
        going = [pool.submit(speak, sequences) for sequences in speaking]
        for _ in going:
            assert begun.acquire(timeout=DEADLINE_S)
        assert several(modest) == expected[:1] * MANY
        served.set()
        assert [one.result(DEADLINE_S) for one in going] == [expected] * 2
        assert sum(sequences.session.num_replays for sequences in speaking) == 1
    assert comes_back_to(full, NONE)
