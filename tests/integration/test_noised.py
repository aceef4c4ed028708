"""Federations with noise: every use works, every release is counted once, and a budget stops the run in good order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import fedsea
from fedsea.cli import main
from fedsea.client import accounts, results
from fedsea.client import run as client_run
from fedsea.client.drafters import PromptLookup
from fedsea.client.gateway.run import Gateway, GatewaySettings
from fedsea.client.generation import GenerationSettings, generate
from fedsea.client.inference import open_decoder
from fedsea.client.local_trunk import LocalTrunk
from fedsea.errors import BudgetExhausted, ConfigError, StorageError
from fedsea.plan import open_channels
from fedsea.privacy.accountant import epsilon_of
from fedsea.privacy.book import FILE, Book
from fedsea.privacy.boundary import Boundary
from fedsea.privacy.ledger import Ledger
from fedsea.types import Channel, Purpose
from tests.support.federation import Federation
from tests.support.opened import open_local

FROZEN = {"input": "frozen", "output": "frozen"}
CLIPPED = {"hidden_std": 40.0, "gradient_std": 40.0, "hidden_clip": 1.0, "gradient_clip": 1.0}
SEGMENT = {"clip_scope": "segment", "learning_rate": 0.01}
STEPS, SEQUENCES = 6, 2


def noised(federation: Any, *names: str, noise: dict[str, Any] = CLIPPED, **sections: Any) -> Federation:
    made: Federation = federation(
        *(names or ("a",)), **{"trust": {"mode": "noised"}, "noise": noise, "adapter": FROZEN} | sections
    )
    return made


def book_of(fed: Federation, name: str = "a") -> Book:
    (folder,) = accounts.find_ledgers(fed.folder / name)
    return Book.open(folder)


def counts(book: Book) -> dict[tuple[str, str], int]:
    return {(str(channel), str(purpose)): found.releases for (channel, purpose), found in book.spent.accounts.items()}


def test_a_federation_with_noise_trains_to_its_end_and_counts_every_sequence(federation):
    fed = noised(federation, "a", "b")
    parts = fed.train(evaluate=True)
    for name, part in parts.items():
        book, summary = book_of(fed, name), part.result
        found = counts(book)
        assert summary.next_step == STEPS
        assert found["hidden", "training"] == found["gradient", "training"] == STEPS * SEQUENCES
        assert found["hidden", "evaluation"] > 0
        assert summary.claim == accounts.reports(fed.folder / name)[0]["sentence"]
        epsilon = epsilon_of(book.spent.total**0.5, 1e-5)
        assert 0 < epsilon < 5
        assert f"epsilon = {epsilon:.4g}" in summary.claim
        # Each sequence was trained on at most so often, and pays for that, not for everybody's steps.
        each = (2 / 40) ** 2
        assert book.spent.account(Channel.GRADIENT, Purpose.TRAINING).most < STEPS * SEQUENCES * each


def test_evaluating_generating_and_training_on_add_up_in_one_ledger(federation):
    fed = noised(federation)
    fed.start_server(exit_when_finished=False)
    fed.start_client("a").finish()
    options = fed.client_options("a", data=())
    totals = [book_of(fed).spent.total]

    def grown() -> float:
        totals.append(book_of(fed).spent.total)
        return totals[-1] - totals[-2]

    assert math.isfinite(results.evaluate(fed.client_options("a")).mean_loss)
    assert counts(book_of(fed))["hidden", "evaluation"] > 0
    with open_decoder(options) as opened, generate(opened.decoder, [5, 6, 7], GenerationSettings(8)) as answer:
        assert len(list(answer)) > 0
    assert grown() > 0
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    with fedsea.SplitCausalLM.connect(fed.address, fed.identities / "a", run=fed.folder / "a") as split:
        with torch.no_grad():
            assert torch.isfinite(split(ids, labels=ids).loss)
        # Two sequences that nobody knows, and that may be the same one: whichever it is has paid twice more.
        assert grown() == pytest.approx(2 * (2 / 40) ** 2)
        split.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert counts(book_of(fed))["hidden", "inference"] > 2
    results.export_adapter(options, fed.folder / "exported")
    before = book_of(fed).spent.total
    assert before == totals[-1] + grown()


def test_the_gradient_of_a_split_model_is_charged_and_noised(federation):
    fed = noised(federation, adapter={"input": "adapter", "output": "frozen"}, aggregation={"sync": "personal"})
    fed.start_server(exit_when_finished=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    with fedsea.SplitCausalLM.connect(fed.address, fed.identities / "a", run=fed.folder / "none", base=True) as split:
        ledger = split.decoder.boundary.ledger
        gradients = []
        for _ in range(2):
            split.zero_grad()
            split(ids, labels=ids).loss.backward()
            gradients.append([p.grad.clone() for p in split.parameters() if p.grad is not None])
        assert ledger.spent.account(Channel.GRADIENT, Purpose.TRAINING).releases == 2
        assert ledger.spent.account(Channel.HIDDEN, Purpose.TRAINING).releases == 2
    assert gradients[0]
    assert not any(torch.equal(one, other) for one, other in zip(*gradients, strict=True) if one.any())


def test_a_budget_stops_the_run_before_it_is_passed_and_keeps_what_was_done(federation):
    fed = noised(federation, noise={**CLIPPED, "epsilon": 0.25}, training={"rounds": 50})
    fed.start_server(exit_when_finished=False)
    with pytest.raises(BudgetExhausted, match="what was trained so far is kept"):
        fed.start_client("a").finish()
    stood = fed.durable()["a"][1]["state"]["next_step"]
    assert 0 < stood < 150
    assert epsilon_of(book_of(fed).spent.total ** 0.5, 1e-5) <= 0.25
    lines = book_of(fed).count
    with pytest.raises(BudgetExhausted):
        fed.start_client("a").finish()
    assert fed.durable()["a"][1]["state"]["next_step"] >= stood
    assert book_of(fed).count <= lines + 2


def test_a_ledger_of_another_plan_stops_the_run_before_anything_is_sent(federation):
    fed = noised(federation)
    with Ledger(fed.folder / "a" / "ledger", fed.plan.model_copy(update={"seed": 99}), "a"):
        pass
    with pytest.raises(StorageError, match="another plan"):
        client_run.train_alone(fed.plan_file, "a", fed.client_options("a"))


def test_hardly_any_noise_and_a_wide_clip_train_as_without(federation):
    free = {"hidden_std": 1e-6, "gradient_std": 1e-6, "hidden_clip": 1e6, "gradient_clip": 1e6}
    losses = []
    for sections in ({"trust": {"mode": "trusted-server"}, "noise": {}}, {"noise": free}):
        fed = noised(federation, **sections)
        parts = fed.train()
        losses.append([report.mean_loss for report in parts["a"].watch.steps])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_gateway_and_chat_answer_with_noise_until_the_budget_is_used_up(base_model, tmp_path):
    noise = {**CLIPPED, "epsilon": 0.5}
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    opened = open_local(base_model, template, trust={"mode": "noised"}, noise=noise, adapter=FROZEN)
    settings = GatewaySettings(port=0, api_key="a key for tests", default_new_tokens=6)
    with Ledger(tmp_path, opened.plan, "a") as ledger:
        opened.decoder.boundary = Boundary.of(opened.plan, "a", ledger)
        with (
            Gateway(opened, settings, PromptLookup()) as gateway,
            openai.OpenAI(base_url=gateway.url, api_key="a key for tests", max_retries=0, timeout=60.0) as client,
        ):
            messages = [{"role": "user", "content": "the old ship"}]
            answered = client.chat.completions.create(model=opened.plan.name, messages=messages)
            assert answered.usage.completion_tokens > 0
            assert ledger.spent.account(Channel.HIDDEN, Purpose.INFERENCE).releases > 0
            with pytest.raises(openai.PermissionDeniedError, match="privacy budget"):
                _until_refused(lambda: client.chat.completions.create(model=opened.plan.name, messages=messages))
        assert epsilon_of(ledger.spent.total**0.5, 1e-5) <= 0.5


def _until_refused(ask: Callable[[], object]) -> None:
    for _ in range(200):
        ask()


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8"])
def test_noise_goes_through_every_codec_and_a_bfloat16_model(federation, codec):
    fed = noised(
        federation,
        noise={"hidden_std": 0.1, "gradient_std": 0.01},
        model={"dtype": "bfloat16"},
        wire={"hidden": codec, "gradient": codec},
        training={"rounds": 1, "steps_per_round": 2},
    )
    part = fed.train()["a"]
    assert part.result.next_step == 2
    assert all(math.isfinite(report.mean_loss) for report in part.watch.steps)
    alone = fed.client_options("a", run=fed.folder / "alone")
    assert client_run.train_alone(fed.plan_file, "a", alone).next_step == 2


# --- one release, one draw --------------------------------------------------------------------------------------------


class Forgetful(LocalTrunk):
    """Loses its half of every step once; what it answers the second time may differ."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sent: list[tuple[str, int, int, torch.Tensor]] = []
        self.forgotten: set[int] = set()
        self.shift = 0.0

    def forward(self, where, hidden):
        self.sent.append(("hidden", where.step, where.number, hidden[""]))
        future = super().forward(where, hidden)
        if where.step in self.forgotten and self.shift:
            future.result().add_(self.shift)
        return future

    def backward(self, where, gradient):
        self.sent.append(("gradient", where.step, where.number, gradient[""]))
        return super().backward(where, gradient)

    def ready(self, step, *rest):
        if step not in self.forgotten:
            self.forgotten.add(step)
            self._propagated = 0
        super().ready(step, *rest)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_step_that_is_done_again_sends_the_same_bytes_unless_the_trunk_answers_otherwise(
    federation, monkeypatch, shift
):
    fed = noised(federation, training={"rounds": 1, "steps_per_round": 2, "micro_batches": 2})
    made: list[Forgetful] = []

    def forgetful(*args: Any) -> Forgetful:
        made.append(Forgetful(*args))
        made[-1].shift = shift
        return made[-1]

    monkeypatch.setattr(client_run, "LocalTrunk", forgetful)
    client_run.train_alone(fed.plan_file, "a", fed.client_options("a"))
    by_place: dict[tuple[str, int, int], list[torch.Tensor]] = {}
    for kind, step, number, tensor in made[0].sent:
        by_place.setdefault((kind, step, number), []).append(tensor)
    assert len(by_place) == 2 * 2 * 2
    for (kind, _, _), tensors in by_place.items():
        assert len(tensors) == 2
        assert torch.equal(*tensors) == (kind == "hidden" or not shift)
    once = 2 * 2 * SEQUENCES
    found = counts(book_of(fed))
    assert found["hidden", "training"] == once
    assert found["gradient", "training"] == (2 * once if shift else once)


def test_rows_of_a_session_are_counted_also_those_that_were_taken_back(base_model, tmp_path):
    plan = {"trust": {"mode": "noised"}, "noise": CLIPPED, "adapter": FROZEN, "inference": {"prefill_tokens": 4}}
    opened = open_local(base_model, **plan)
    price = (2 / 40) ** 2
    with Ledger(tmp_path, opened.plan, "a") as ledger:
        opened.decoder.boundary = Boundary.of(opened.plan, "a", ledger)
        with opened.decoder.open(16, 2) as sequences:
            sequences.extend([[5, 6, 7, 8, 9], [5, 6]])
            sequences.extend([[5], [5]])
            sequences.rollback([3, 3])
            sequences.extend([[5, 6, 7], [8]])
        assert ledger.spent.total == pytest.approx(price * (7 + 2 + 4) / 16)


def test_a_token_pays_for_every_row_that_may_be_its_copy(base_model, tmp_path):
    closed = {"input": "frozen", "trunk": "frozen", "output": "adapter"}
    noise = {"hidden_std": 40.0, "hidden_clip": 1.0, "unit": "token"}
    sections = {"partition": {"input_blocks": 0}, "aggregation": {"sync": "personal"}, "optimizer": SEGMENT}
    plan = {"trust": {"mode": "noised"}, "noise": noise, "adapter": closed, "inference": {"prefill_tokens": 4}}
    opened = open_local(base_model, **plan | sections)
    price = (2 / 40) ** 2
    with Ledger(tmp_path, opened.plan, "a") as ledger:
        opened.decoder.boundary = Boundary.of(opened.plan, "a", ledger)
        with opened.decoder.open(16, 2) as sequences:
            sequences.extend([[5, 6, 7, 8, 9], [5, 6]])  # once in each
            assert ledger.spent.total == pytest.approx(price * 2)
            sequences.extend([[5, 6, 7], []])  # as a drafter copies it
            assert ledger.spent.total == pytest.approx(price * 5)
            sequences.rollback([6, 2])
            sequences.reorder([0, 0])
            sequences.extend([[6], [8]])
        assert ledger.spent.total == pytest.approx(price * 7)


def test_one_sealed_update_is_sent_for_a_round_however_often_it_is_asked_for(federation, monkeypatch):
    noise = {**CLIPPED, "update_std": 0.1, "update_clip": 0.5}
    fed = noised(federation, adapter={"input": "frozen", "output": "adapter"}, noise=noise, optimizer=SEGMENT)
    asked: list[Any] = []
    original = LocalTrunk.update

    def update(self, round_index, tokens, parameters):
        asked.append((round_index, {name: tensor.clone() for name, tensor in parameters.items()}))
        if len(asked) % 2 == 0:
            original(self, round_index, tokens, parameters)

    monkeypatch.setattr(LocalTrunk, "update", update)
    summary = client_run.train_alone(fed.plan_file, "a", fed.client_options("a"))
    assert [index for index, _ in asked] == [0, 0, 1, 1]
    for (_, one), (_, other) in zip(asked[::2], asked[1::2], strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert counts(book_of(fed))["update", "training"] == 2
    assert "updates alone" in summary.claim or "no protection" in summary.claim


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_mode_is_said_at_every_start_and_the_claim_at_the_end(federation, capsys, restored):
    fed = noised(federation, noise={"hidden_std": 0.5})
    run = fed.folder / "a"
    command = ["train", "--alone", "--plan", str(fed.plan_file), "--name", "a", "--data", str(fed.silos["a"])]
    assert main.run([*command, "--run", str(run), "--threads", "1", "--no-eval"]) == 0
    said = capsys.readouterr()
    assert "No DP claim: no clip bounds the hidden states" in said.out
    assert "gradients leave without noise" in said.out
    assert "Trust mode: noised" in said.err
    assert main.run(["ledger", str(run), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["ledgers"]
    assert {row["channel"]: row["releases"] for row in report["rows"]} == {"hidden": 12, "gradient": 12}
    assert not report["claim"]["made"]
    assert main.run(["ledger", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "no DP claim: " in shown
    assert "12" in shown


def test_the_ledger_command_shows_the_budget_and_what_is_spent_of_it(federation, capsys, restored):
    fed = noised(federation, noise={**CLIPPED, "epsilon": 8.0})
    run = fed.folder / "a"
    client_run.train_alone(fed.plan_file, "a", fed.client_options("a"))
    assert main.run(["ledger", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "epsilon = 8, " in shown
    assert " % of it spent" in shown
    assert "DP claim: epsilon = " in shown


def test_the_ledger_of_a_trusted_run_says_why_there_is_none(federation, capsys, restored):
    fed = federation("a")
    client_run.train_alone(fed.plan_file, "a", fed.client_options("a"))
    assert main.run(["ledger", str(fed.folder / "a")]) == 0
    assert "no DP claim: trust.mode is trusted-server" in capsys.readouterr().out
    assert not list(Path(fed.folder).rglob(FILE))


def test_the_ledger_command_refuses_what_it_cannot_trust(federation, tmp_path, capsys, restored):
    assert main.run(["ledger", str(tmp_path)]) == ConfigError.exit_code
    assert "holds no ledger" in capsys.readouterr().err
    with Ledger(tmp_path, noised(federation).plan, "a"):
        pass
    raw = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(raw[: len(raw) // 2])
    assert main.run(["ledger", str(tmp_path)]) == StorageError.exit_code
    assert "truncated or replaced" in capsys.readouterr().err


def test_a_closed_backward_channel_sends_no_gradient_and_says_so(federation, caplog):
    fed = noised(
        federation,
        adapter={"input": "frozen", "trunk": "frozen", "output": "adapter"},
        aggregation={"sync": "personal"},
        noise={"hidden_std": 40.0, "hidden_clip": 1.0},
        optimizer=SEGMENT,
    )
    part = fed.train()["a"]
    assert "Backward" not in part.result.bytes_by_kind or not part.result.bytes_by_kind["Backward"]
    assert counts(book_of(fed)) == {("hidden", "training"): STEPS * SEQUENCES}
    assert "backward channel: closed" in caplog.text
    assert open_channels(fed.plan, "a") == (Channel.HIDDEN,)
    assert part.result.claim.startswith("DP claim: epsilon = ")
