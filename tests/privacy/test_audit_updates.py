"""Attacks A7 and A8: what a client's update and the trained adapters tell."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.audit.attacks import a7_update, a8_membership, a9_mechanism
from fedsea.audit.attacks.membership import membership
from fedsea.audit.attacks.output_inversion import name_labels
from fedsea.audit.attacks.update_inversion import SpanFindings, invert, token_inputs
from fedsea.audit.attacks.update_scoring import Case, UpdateInversion, result_of
from fedsea.audit.canaries import Texts
from fedsea.audit.curves import attacker_of as audited_attacker_of
from fedsea.audit.settings import AuditOptions
from fedsea.audit.subject import variant
from fedsea.audit.targets import OutOfTime
from fedsea.audit.training import SplitRun, batches_of, pack
from fedsea.audit.verdict import Verdict
from fedsea.errors import ConfigError
from fedsea.model.checkpoint import open_checkpoint
from fedsea.plan import FederationPlan
from fedsea.types import Channel
from tests.support.attacked import attacker_of, noised, plan_of, targets_of, texts
from tests.support.audited import PLAN, subject_of


def training_plan(folder: Path, batch: int = 4, **sections: Any) -> FederationPlan:
    training = {"micro_batch_sequences": batch, "steps_per_round": 60}
    return plan_of(folder, 1, 1, training=training, optimizer={"learning_rate": 3e-3}, **sections)


@pytest.mark.parametrize("rank", [8, 16])
def test_lora_gradients_name_every_token_of_a_text_if_their_rows_are_enough(base_model: Path, rank: int) -> None:
    """q, k and v read the same input: three times the rank, against the distinct tokens of a text."""
    plan = training_plan(base_model, adapter={"rank": rank}, aggregation={"sync": "step"})
    split = SplitRun(plan, open_checkpoint(plan.model.path))
    split.train(batches_of(texts(16, 24, seed=3), 4, 3))
    inputs = token_inputs(attacker_of(plan).input_blocks, 260)
    for text in texts(4, 16):
        found = invert(split.gradients(pack([text]))[1], inputs)
        assert found.method == "span"
        assert found.conclusive
        assert set(found.found) == set(text[:-1].tolist())


def test_more_tokens_than_rows_leave_no_token_in_the_span_and_the_attack_says_so(base_model: Path) -> None:
    plan = training_plan(base_model, adapter={"rank": 1}, aggregation={"sync": "step"})
    split = SplitRun(plan, open_checkpoint(plan.model.path))
    split.train(batches_of(texts(16, 24, seed=3), 4, 3))
    inputs = token_inputs(attacker_of(plan).input_blocks, 260)
    found = invert(split.gradients(pack(texts(2, 40)))[1], inputs)
    assert (found.rows, found.rank, found.conclusive) == (3, 3, False)
    assert found.method == "sparse"


@pytest.mark.parametrize(
    "aggregation",
    [{"sync": "step"}, {"sync": "round"}, {"sync": "round", "secure": True}],
    ids=["step", "round", "sum"],
)
def test_full_training_names_every_token_even_in_a_sum_of_clients(
    base_model: Path, aggregation: dict[str, Any]
) -> None:
    clients = [{"name": name} for name in "abc"]
    adapter = {"input": "full", "output": "frozen"}
    plan = training_plan(base_model, 2, adapter=adapter, aggregation=aggregation, clients=clients)
    report = a7_update.run(attacker_of(plan, public=texts(8, 24, seed=4)), targets_of(texts(6, 24)))
    assert report.verdict is Verdict.EXPOSED
    assert all(case.recall == case.precision == case.conclusive == 1.0 for case in report.cases)
    assert {case.clients for case in report.cases} == ({3} if "secure" in aggregation else {1, 3})


def test_noise_on_the_forward_channel_does_not_touch_an_update_but_noise_on_the_update_does(base_model: Path) -> None:
    found, adapter = [], {"rank": 16, "output": "frozen"}
    for noise in ({"hidden_std": 1.0, "gradient_std": 1e-3}, {"hidden_std": 1.0, "update_std": 0.1}):
        plan = training_plan(base_model, 1, aggregation={"sync": "step"}, adapter=adapter, **noised(**noise))
        report = a7_update.run(attacker_of(plan, public=texts(8, 16, seed=4)), targets_of(texts(8, 16)))
        found.append(report.cases[0])
    assert found[0].recall == found[0].precision == found[0].conclusive == 1.0
    assert found[1].recall < 0.9 or found[1].precision < 0.9
    assert found[1].conclusive == 0.0


def test_tokens_named_at_random_are_no_exposure_however_many_are_named() -> None:
    """Naming half of the vocabulary names most tokens of any text; what counts is how many of them were there."""
    truths = [set(range(0, 200, 5)), set(range(0, 200, 4))]
    found = [SpanFindings(tuple(range(200)), 3, 3, "sparse", False)] * 2
    case = Case("difference", 1, 1, 2, "input")
    greedy = result_of(case, found, truths, list(range(500, 600)), [40, 50])
    assert greedy.recall == 1.0
    assert greedy.quality < 0.4
    assert a7_update.UpdateReport((greedy,)).verdict is Verdict.PARTIAL
    common = result_of(case, found, truths, list(range(200)), [40, 50])
    assert a7_update.UpdateReport((common,)).verdict is Verdict.NOT_RECOVERED


@pytest.mark.parametrize(
    ("hits", "verdict"),
    [([9, 0, 0, 0, 0, 0, 0, 0], Verdict.NOT_RECOVERED), ([2] * 8, Verdict.PARTIAL), ([2, 2], Verdict.PARTIAL)],
)
def test_a_token_here_and_there_is_no_excess_and_some_in_every_update_are(hits: list[int], verdict: Verdict) -> None:
    """Nine tokens of one update of eight may be luck, two of each are not."""
    truths = [set(range(20))] * len(hits)
    found = [SpanFindings(tuple(range(hit)), 3, 3, "sparse", False) for hit in hits]
    case = Case("gradient", 1, 1, 1, "input")
    made = result_of(case, found, truths, list(range(500, 600)), hits)
    assert made.excess_share > 0.05
    report = a7_update.UpdateReport((made,))
    assert report.verdict is verdict
    assert ("no certain excess" in report.sentence) is (verdict is Verdict.NOT_RECOVERED)


@pytest.mark.parametrize(
    ("aggregation", "least"),
    [({"sync": "step"}, 0.95), ({"sync": "round"}, 0.6), ({"sync": "round", "secure": True}, 0.6)],
    ids=["step", "round", "sum"],
)
def test_rows_of_the_head_that_are_pulled_up_name_the_labels_whatever_the_noise_on_hidden_states(
    aggregation: dict[str, Any], least: float
) -> None:
    subject = subject_of()
    adapter = {"input": "frozen", "trunk": "frozen", "output": "full"}
    sections = noised(hidden_std=50.0) | {"clients": [{"name": name} for name in "abc"]}
    plan = plan_of(PLAN.parent / "model", adapter=adapter, aggregation=aggregation, **sections)
    made = Texts(subject.tokenizer, plan, 32)
    attacker = attacker_of(plan)
    attacker.public = attacker.sampled(8, 32, 0)
    report = a7_update.run(attacker, made.canaries(3, 0))
    assert {case.side for case in report.cases} == {"output"}
    assert all(case.quality > least > 2 * case.guess_quality for case in report.cases)
    assert "of the output side" in report.sentence


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]])
def test_lora_of_the_output_side_gives_the_labels_away_though_no_gradient_leaves_at_the_cut(
    base_model: Path, targets: str | list[str]
) -> None:
    closed = {"input": "frozen", "trunk": "frozen", "rank": 8, "targets": targets}
    plan = training_plan(base_model, 1, adapter=closed, aggregation={"sync": "step"}, **noised(hidden_std=50.0))
    assert not plan.sends_gradients("a")
    report = a7_update.run(attacker_of(plan, public=texts(8, 24, seed=4)), targets_of(texts(2, 24)))
    assert report.cases[0].method == "matching"
    assert report.cases[0].recall > 0.9
    assert report.verdict is Verdict.EXPOSED


def test_own_texts_are_told_apart_from_planted_notes_and_not_diluted_by_them(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of a gradient name the tokens of a short text, and few of a long one's."""
    monkeypatch.setattr(a7_update, "_MOST_UPDATES", 6)
    plan = training_plan(base_model, adapter={"rank": 1, "output": "frozen"}, aggregation={"sync": "step"})
    planted = targets_of(texts(8, 40))
    own = [replace(target, own=True) for target in targets_of([ids_T[:4] for ids_T in texts(2, 8, seed=5)])]
    attacker = attacker_of(plan, public=texts(8, 24, seed=4), num_clients=5)
    report = a7_update.run(attacker, planted + own)
    whole, alone = report.cases[0], {name: one.cases[0] for name, one in report.sets.items()}
    assert (whole.clients, whole.sequences, whole.updates) == (1, 1, 6)
    assert {name: case.updates for name, case in alone.items()} == {"planted": 4, "own texts": 2}
    assert alone["own texts"].recall == 1.0
    assert not whole.exposed
    assert not alone["planted"].exposed
    assert report.verdict is Verdict.EXPOSED
    assert "own texts 1.00" in report.sentence
    sums = [case for case in report.cases if case.clients == 3]
    assert sums[0].updates == 3  # the third of what was left over of both
    found = report.to_json()["sets"]
    assert found["own texts"]["recovery"] == 1.0 > found["planted"]["recovery"]
    assert a7_update.run(attacker, planted).sets == {}


def test_a_few_updates_of_one_set_alone_are_no_certain_excess() -> None:
    case = Case("gradient", 1, 1, 1, "input")

    def made(updates: int, hits: int) -> UpdateInversion:
        truths = [set(range(20))] * updates
        found = [SpanFindings(tuple(range(hits)), 3, 3, "sparse", False)] * updates
        return result_of(case, found, truths, list(range(500, 600)), [hits] * updates)

    for updates, verdict in ((2, Verdict.NOT_RECOVERED), (8, Verdict.PARTIAL)):
        sets = {"own texts": a7_update.UpdateReport((made(updates, 2),))}
        assert a7_update.UpdateReport((made(10, 0),), sets=sets).verdict is verdict


@pytest.mark.parametrize(("federation", "sums"), [(1, {1}), (2, {1, 2}), (5, {1, 3})])
def test_no_sum_is_spoken_of_that_has_more_clients_than_the_federation(
    base_model: Path, federation: int, sums: set[int]
) -> None:
    plan = training_plan(base_model, adapter={"rank": 1, "output": "frozen"}, aggregation={"sync": "step"})
    attacker = attacker_of(
        plan, public=texts(2, 8, seed=4), num_clients=federation
    )  # an audit's plan keeps one of them
    report = a7_update.run(attacker, targets_of(texts(3, 8)))
    assert {case.clients for case in report.cases} == sums


def test_an_audit_knows_how_many_clients_the_federation_has() -> None:
    subject = subject_of()
    options, made = AuditOptions(PLAN), Texts(subject.tokenizer, subject.plan, 24)
    plan = variant(subject.plan, subject.name)
    assert len(plan.client_names) == 1
    attacker = audited_attacker_of(subject, subject.partition, {}, made, options, plan)
    assert attacker.num_clients == len(subject.plan.client_names) > 1


def test_what_was_attacked_before_the_time_was_up_is_kept(base_model: Path) -> None:
    plan = training_plan(base_model, adapter={"rank": 1}, aggregation={"sync": "step"})
    attacker = attacker_of(plan, public=texts(8, 24, seed=4))

    def until_the_output_side(done: int, total: int) -> None:
        if calls.append(done) or len(calls) > 1:
            raise OutOfTime

    calls: list[int] = []
    report = a7_update.run(attacker, targets_of(texts(4, 24)), until_the_output_side)
    assert [case.side for case in report.cases] == ["input"]
    assert report.cut_short
    assert report.verdict in (Verdict.INCONCLUSIVE, Verdict.EXPOSED)
    assert "time was up" in report.sentence
    calls = [0]
    with pytest.raises(OutOfTime):  # of nothing nothing can be said
        a7_update.run(attacker, targets_of(texts(4, 24)), until_the_output_side)


def test_noise_on_an_update_of_the_output_side_hides_its_labels(base_model: Path) -> None:
    closed = {"input": "frozen", "trunk": "frozen"}
    for output in ("adapter", "full"):
        noise = noised(hidden_std=1.0, update_std=10.0)
        plan = training_plan(base_model, adapter=closed | {"output": output}, aggregation={"sync": "step"}, **noise)
        attacker = attacker_of(plan, public=texts(8, 24, seed=4))
        attacker.noise_std[Channel.UPDATE] = 10.0
        report = a7_update.run(attacker, targets_of(texts(1, 24)))
        assert report.verdict is not Verdict.EXPOSED
        assert report.cases[0].conclusive == 0.0


def test_the_output_blocks_are_left_as_they_were(base_model: Path) -> None:
    plan = training_plan(base_model, aggregation={"sync": "step"})
    split = SplitRun(plan, open_checkpoint(plan.model.path))
    batch = pack(texts(2, 12))
    pulls = {name: -tensor for name, tensor in split.gradients(batch)[1].items()}
    before, blocks = split.parameters(), split.segments.output_blocks
    found = name_labels(blocks, pulls, split.output_TH, batch.lengths, gradient=True)
    assert found.found
    assert blocks.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in split.parameters().items())


def test_a_run_that_begins_again_is_one_that_was_never_trained(base_model: Path) -> None:
    """Models are loaded once for many clients' rounds; neither weights nor moments nor noise of another's may stay."""
    adapter, optimizer = {"input": "full", "rank": 2}, {"learning_rate": 1e-2}
    plan = plan_of(base_model, adapter=adapter, optimizer=optimizer, **noised(hidden_std=0.1, gradient_std=1e-3))
    split = SplitRun(plan, open_checkpoint(plan.model.path), key=b"a" * 32)
    begins, one, other = split.parameters(), pack(texts(2, 12)), pack(texts(2, 12, seed=5))
    expected = split.train([one, one])
    trained = split.parameters()
    assert all(not torch.equal(tensor, begins[name]) for name, tensor in trained.items() if "lora_A" not in name)
    split.train([other])
    split.gradients(other)
    split.begin_again(begins, b"a" * 32)
    assert split.train([one, one]) == expected
    assert all(torch.equal(tensor, trained[name]) for name, tensor in split.parameters().items())


@pytest.mark.parametrize(
    "sections", [{"aggregation": {"sync": "personal"}}, {"adapter": {"input": "frozen", "output": "frozen"}}]
)
def test_an_update_that_does_not_leave_tells_nothing(base_model: Path, sections: dict[str, Any]) -> None:
    report = a7_update.run(attacker_of(training_plan(base_model, **sections)), targets_of(texts(8, 16)))
    assert report.cases == ()
    assert report.verdict is Verdict.NOT_RECOVERED


# --- membership -------------------------------------------------------------------------------------------------------


def test_texts_that_were_trained_on_are_told_from_others_of_the_same_kind(base_model: Path) -> None:
    plan = plan_of(base_model, 1, 1, optimizer={"learning_rate": 2e-2}, training={"steps_per_round": 40})
    report = a8_membership.run(attacker_of(plan), targets_of(texts(24, 24)))
    assert report.found is not None
    assert report.found.auc_interval[0] > 0.75
    assert report.verdict is Verdict.PARTIAL  # which texts is told, and no text is recovered
    hasty = a8_membership.run(attacker_of(plan, budget_s=0.0), targets_of(texts(24, 24)))
    assert hasty.epochs == 0.0
    assert hasty.verdict is Verdict.INCONCLUSIVE
    assert "time was up" in hasty.sentence


@pytest.mark.parametrize("sync", ["personal", "round"])
def test_adapters_that_stay_at_the_client_tell_the_server_nothing(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, sync: str
) -> None:
    judged: list[dict[str, torch.Tensor]] = []
    losses = SplitRun.losses

    def noted(self: SplitRun, *args: Any, **more: Any) -> list[float]:
        judged.append(self.parameters())
        return losses(self, *args, **more)

    monkeypatch.setattr(SplitRun, "losses", noted)
    training = {"steps_per_round": 2, "rounds": 1}
    report = a8_membership.run(
        attacker_of(plan_of(base_model, aggregation={"sync": sync}, training=training)), targets_of(texts(16, 8))
    )
    before, _, after, _ = judged
    ends = ("model.layers.0.", "model.layers.4.")
    moved = {not name.startswith(ends) for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert (report.adapters, moved) == (("trunk", {True}) if sync == "personal" else ("all", {True, False}))


@pytest.mark.parametrize("learning_rate", [1e-30, 1e-9])
def test_losses_that_moved_by_no_more_than_rounding_are_no_evidence(base_model: Path, learning_rate: float) -> None:
    plan = plan_of(base_model, 1, 1, optimizer={"learning_rate": learning_rate}, training={"steps_per_round": 2})
    report = a8_membership.run(attacker_of(plan), targets_of(texts(40, 16)))
    assert report.found is None
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "rounding" in report.sentence


def _judged(monkeypatch: pytest.MonkeyPatch, folder: Path, *losses: list[float]) -> a8_membership.MembershipReport:
    """A report on losses of members and of others, before a training and after it."""
    found = iter(losses)
    monkeypatch.setattr(SplitRun, "losses", lambda *_args, **_kwargs: next(found))
    monkeypatch.setattr(SplitRun, "train", lambda *_args, **_kwargs: [])
    plan = plan_of(folder, 1, 1, training={"steps_per_round": 1})
    return a8_membership.run(attacker_of(plan), targets_of(texts(40, 8)))


@pytest.mark.parametrize("nan_in", range(4))
def test_losses_that_are_not_finite_are_no_evidence(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, nan_in: int
) -> None:
    losses = [[1.0] * 20, [1.0] * 20, [0.5] * 20, [0.5] * 20]
    losses[nan_in][7] = math.nan
    report = _judged(monkeypatch, base_model, *losses)
    assert report.found is None
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "not finite" in report.sentence
    with pytest.raises(ConfigError, match="finite"):
        membership([1.0, math.nan], [0.0])


def test_losses_that_all_moved_alike_but_for_their_last_bits_are_no_evidence(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, bit = [3.0] * 20, 5e-7
    report = _judged(monkeypatch, base_model, before, before, [2.9 - bit] * 20, [2.9] * 20)
    assert report.found is None
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "100% of the pairs" in report.sentence
    assert "rounding" in report.sentence


def test_last_bits_of_some_losses_add_nothing_to_what_the_others_tell(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, bit = [3.0] * 20, 5e-7
    halves = [*[2.9] * 10, *[2.8] * 10]
    report = _judged(monkeypatch, base_model, before, before, [loss - bit for loss in halves], halves)
    assert report.found is not None
    assert report.found.auc == 0.5
    assert report.found.auc_interval[0] <= 0.5
    assert report.found.tpr == 0.0
    assert report.found.exposure == membership([0.0, 1.0], [0.0] * 10 + [1.0] * 10).exposure


def test_equal_scores_are_a_guess() -> None:
    found = membership([0.0] * 20, [0.0] * 20)
    assert found.auc_interval[0] <= found.auc == 0.5 <= found.auc_interval[1]
    assert found.exposure == pytest.approx(math.log2(21 / 11)), "the middle rank of 21"


def test_too_few_texts_are_inconclusive_and_an_empty_side_is_refused(base_model: Path) -> None:
    report = a8_membership.run(attacker_of(plan_of(base_model)), targets_of(texts(4, 16)))
    assert report.verdict is Verdict.INCONCLUSIVE
    with pytest.raises(ConfigError, match="trained on"):
        membership([], [1.0])


def test_exposure_is_the_rank_in_bits() -> None:
    found = membership([10.0, -1.0], [float(i) for i in range(7)])
    assert found.exposure == pytest.approx((3.0 + 0.0) / 2)
    assert found.most_exposure == pytest.approx(3.0)
    assert (found.auc, found.tpr, found.fpr) == (0.5, 0.5, 0.0)
    assert membership([1.0, 1.0], [1.0] * 7).exposure == pytest.approx(3.0 - math.log2(4.5)), (
        "no rank is the best of equals"
    )


@pytest.mark.parametrize("sync", ["step", "round"])
def test_the_same_seed_gives_the_noise_that_attacks_make_themselves_again(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, sync: str
) -> None:
    monkeypatch.setattr(a9_mechanism, "_TRIALS", 500)
    monkeypatch.setattr(a9_mechanism, "_UPDATE_TRIALS", 100)
    noise = {"hidden_std": 0.05, "gradient_std": 1e-4, "update_std": 5e-4}
    clips = {"hidden_clip": 50.0, "gradient_clip": 1.0, "update_clip": 10.0}
    clients = [{"name": name} for name in "abc"]
    training = {"micro_batch_sequences": 1, "steps_per_round": 2, "rounds": 1}
    optimizer = {"learning_rate": 3e-3, "max_norm": 0.0}
    sections = {"aggregation": {"sync": sync}, "clients": clients, "training": training, "optimizer": optimizer}
    sections["adapter"] = {"rank": 16, "output": "frozen"}  # what it takes to match an output side is not needed here
    plan = plan_of(base_model, 1, 1, **sections, **noised(**noise, **clips))

    attacker = attacker_of(plan, public=texts(4, 12, seed=4), seed=3)
    aims = {a7_update: targets_of(texts(3, 12)), a8_membership: targets_of(texts(16, 12)), a9_mechanism: []}
    once, again = ([json.dumps(attack.run(attacker, aim).to_json()) for attack, aim in aims.items()] for _ in range(2))
    assert once == again
