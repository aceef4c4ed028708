"""The server is killed, or the connection cut, in the middle of an answer: the tokens are those of the whole model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.decoding import FAMILIES, answer, central, decoding, family_checkpoint, greedy, prompt_of
from tests.support.federation import Federation
from tests.support.processes import Fault
from tests.support.proxy import CuttingProxy

DEADLINE_S = 60.0
PROMPT, NEW = 11, 8  # three messages of the prompt, then one a token
BATCH = "fedsea.server.batches:Batcher.run"
POINTS = {
    "in the prefill": Fault(BATCH, 2, after=True),
    "in the middle": Fault(BATCH, 6),
    "at the last token": Fault(BATCH, 10, after=True),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return {family: family_checkpoint(tmp_path_factory.mktemp("model") / family, family) for family in FAMILIES}


@pytest.fixture
def make(tmp_path, identities):
    made: list[Federation] = []

    def federation(model, **inference):
        plan = {"inference": {"prefill_tokens": 4, **inference}}
        made.append(Federation(tmp_path / str(len(made)), model, identities, ("a",), plan))
        return made[-1]

    yield federation
    for one in made:
        one.close()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answer_goes_on_with_the_same_tokens_when_the_server_was_killed_and_started_again(
    make, families, family, point
):
    fed = make(families[family])
    prompt = prompt_of(PROMPT)
    expected = central(families[family], prompt, NEW)
    server = fed.spawn_server(POINTS[point])
    with decoding(fed) as decoder, ThreadPoolExecutor(1) as pool, decoder.open(PROMPT + NEW) as sequences:
        going = pool.submit(greedy, sequences, prompt, NEW)
        server.wait_killed()
        fed.spawn_server()
        assert going.result(DEADLINE_S) == expected
        # In the prefill, the answer that went before may or may not have left the server.
        assert sequences.session.num_replays == 1 or point == "in the prefill"
        assert answer(decoder, prompt, NEW) == expected, "and a new one works as well"


def test_all_of_many_unequal_answers_go_on_when_the_server_was_killed(make, families):
    fed = make(families["llama"])
    prompts = [prompt_of(1 + number, number) for number in range(16)]
    expected = [central(families["llama"], prompt, NEW) for prompt in prompts]
    server = fed.spawn_server(Fault(BATCH, 20))
    with decoding(fed) as decoder, ThreadPoolExecutor(len(prompts)) as pool:
        going = [pool.submit(answer, decoder, prompt, NEW) for prompt in prompts]
        server.wait_killed()
        fed.spawn_server()
        assert [one.result(DEADLINE_S) for one in going] == expected


def test_connection_that_breaks_again_and_again_needs_no_replay(make, families):
    fed = make(families["llama"])
    fed.spawn_server()
    prompt, new = prompt_of(40), 80
    expected = central(families["llama"], prompt, new)
    # The prompt's hidden states are 40 * 128 bytes; a message of one token is some 200 with what TLS and gRPC add.
    with CuttingProxy(fed.address, [9_000, 16_000, 22_000, 28_000]) as proxy:
        with decoding(fed, through=proxy.address) as decoder, decoder.open(len(prompt) + new) as sequences:
            assert greedy(sequences, prompt, new) == expected
            assert sequences.session.num_replays == 0
        assert proxy.num_cuts >= 3
