"""Federations from start to end, on threads: what they leave, and what happens when something does not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedsea.client import run as client_run
from fedsea.client import setup
from fedsea.client.local_trunk import LocalTrunk
from fedsea.client.segments import ClientSegments
from fedsea.client.trainer import Trainer
from fedsea.errors import AuthError, ConfigError, DataError, FedseaError, NonFiniteError, StorageError
from fedsea.storage import CheckpointStore
from fedsea.wire.identity import Authority, enroll, install, peers
from tests.support.assets import make_checkpoint
from tests.support.federation import Watch, make_identities


def test_a_federation_trains_to_its_end(federation):
    fed = federation("a", "b")
    parts = fed.train(evaluate=True)
    for part in parts.values():
        assert part.result.next_step == 6
        assert part.watch.loaded == [f"reaching the server {fed.address}", setup.CHECKING, setup.READING, setup.LOADING]
        assert [report.step for report in part.watch.steps] == list(range(6))
        assert part.result.loss_after < part.result.loss_before
        assert part.result.bytes_sent > part.result.bytes_by_kind["Forward"] > 0


def test_clients_hold_the_same_parameters_after_a_round(federation):
    fed = federation("a", "b")
    fed.train()
    durable = fed.durable()
    ours, theirs = (
        {name: tensor for name, tensor in durable[who][0].items() if name.startswith("parameter.")} for who in "ab"
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_personal_parameters_stay_different(federation):
    fed = federation("a", "b", aggregation={"sync": "personal"})
    fed.train()
    durable = fed.durable()
    differing = [n for n, t in durable["a"][0].items() if n.startswith("p") and not torch.equal(t, durable["b"][0][n])]
    assert differing
    assert "rounds" not in durable


@pytest.mark.parametrize("sync", ["round", "step"])
def test_training_alone_gives_the_bits_of_a_federation_of_one(federation, sync):
    fed = federation("a", aggregation={"sync": sync}, optimizer={"max_norm": 0.05})  # which clips every step
    fed.train()
    options = fed.client_options("a", run=fed.folder / "alone")
    client_run.train_alone(fed.plan_file, "a", options)
    alone = client_run.ClientStore.peek(options.run)
    together = fed.durable()["a"][0]
    assert alone.keys() == together.keys()
    assert all(torch.equal(tensor, together[name]) for name, tensor in alone.items())


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"targets": ["nonsense"]}, "'nonsense' names no linear layer"),
        ({"targets": ["model.layers.0.self_attn.q_proj"]}, "the trunk has no linear layer that adapter.targets names"),
    ],
)
def test_training_alone_refuses_targets_that_its_model_has_not(federation, adapter, says):
    fed = federation("a", adapter=adapter)
    with pytest.raises(ConfigError, match=says):
        client_run.train_alone(fed.plan_file, "a", fed.client_options("a"))


def test_training_alone_counts_the_trunk_s_work_as_the_trunk_s(federation, monkeypatch):
    fed, now, watch = federation("a"), [0.0], Watch()

    def taking(seconds, call):
        def called(*args):
            now[0] += seconds
            return call(*args)

        return called

    monkeypatch.setattr("fedsea.client.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))
    for name, seconds in (("forward", 2.0), ("backward", 3.0)):
        monkeypatch.setattr(LocalTrunk, name, taking(seconds, getattr(LocalTrunk, name)))
    summary = client_run.train_alone(fed.plan_file, "a", fed.client_options("a", evaluate=False), watch)
    assert watch.loaded == [setup.CHECKING, setup.READING, setup.LOADING_ALL]
    count, _ = fed.plan.micro_batches_of("a")
    assert summary.phases_s == {"input": 0.0, "trunk": 6 * count * 5.0, "output": 0.0, "commit": 0.0}


def test_training_alone_goes_on_where_it_was_interrupted(federation, monkeypatch):
    fed = federation("a")
    whole, parts = (fed.client_options("a", run=fed.folder / run) for run in ("whole", "parts"))
    client_run.train_alone(fed.plan_file, "a", whole)
    original, applied = Trainer._apply, []

    def interrupted(self, done):
        applied.append(done.step)
        if applied == [0, 1]:
            raise StorageError("the disk is full")
        original(self, done)

    monkeypatch.setattr(Trainer, "_apply", interrupted)
    with pytest.raises(StorageError):
        client_run.train_alone(fed.plan_file, "a", parts)
    summary = client_run.train_alone(fed.plan_file, "a", parts)
    assert (summary.next_step, applied) == (6, [0, 1, 1, 2, 3, 4, 5])
    expected, found = (client_run.ClientStore.peek(options.run) for options in (whole, parts))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_training_alone_goes_on_in_the_same_process_after_ctrl_c(federation):
    fed = federation("a")
    options = fed.client_options("a", evaluate=False)

    class Stops(Watch):
        def step(self, report):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client_run.train_alone(fed.plan_file, "a", options, Stops())
    assert client_run.train_alone(fed.plan_file, "a", options).next_step == 6


def test_training_alone_does_not_go_on_from_parts_of_different_steps(federation, monkeypatch):
    fed = federation("a")
    options, original = fed.client_options("a", evaluate=False), Trainer._apply

    def stopped(self, done):
        if done.step == 2:
            raise StorageError("the disk is full")
        original(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_apply", stopped)
        with pytest.raises(StorageError):
            client_run.train_alone(fed.plan_file, "a", options)
    (options.run / "checkpoints" / "step-00000002.safetensors").unlink()
    with pytest.raises(StorageError, match="what lies between is missing"):
        client_run.train_alone(fed.plan_file, "a", options)
    (options.run / "prepared.safetensors").unlink()
    with pytest.raises(StorageError, match="is at step 1, the trunk's at step 3"):
        client_run.train_alone(fed.plan_file, "a", options)


def test_a_checkpoint_that_was_lost_is_told_beside_the_error_that_ended_the_run(federation, monkeypatch, caplog):
    fed = federation("a")
    original_save, original_head = CheckpointStore.save, ClientSegments.head

    def full(self, step, tensors, state):
        if step == 2 and self.folder.name == "checkpoints":
            raise StorageError("Cannot write: the disk is full.")
        original_save(self, step, tensors, state)

    def poisoned(self, batch, hidden, update, number):
        return original_head(self, batch, hidden * float("nan") if update == 2 else hidden, update, number)

    monkeypatch.setattr(CheckpointStore, "save", full)
    monkeypatch.setattr(ClientSegments, "head", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        client_run.train_alone(fed.plan_file, "a", fed.client_options("a"))
    assert isinstance(caught.value.__cause__, StorageError)
    assert "the disk is full" in caplog.text


# --- clients that come late or misbehave --------------------------------------------------------------------------

WAITING = {"rounds": 2, "steps_per_round": 4, "wait": 0.1}


def test_a_client_that_joins_late_takes_part_from_the_next_round_on(federation):
    fed = federation("a", "b", training={**WAITING, "steps_per_round": 12, "wait": 2.0})
    fed.start_server()
    first = fed.start_client("a")
    first.watch.wait_for(lambda: len(first.watch.steps) >= 2)
    late = fed.start_client("b")
    for part in (first, late, fed.server):
        part.finish()
    assert 0 < len(late.watch.steps) < 24
    assert len(first.watch.steps) == 24
    durable = fed.durable()
    name = next(n for n in durable["a"][0] if n.startswith("parameter."))
    assert torch.equal(durable["a"][0][name], durable["b"][0][name])


def test_a_client_whose_loss_is_not_finite_stops_and_others_go_on(federation, monkeypatch):
    original = ClientSegments.head

    def poisoned(self, batch, hidden, update, number):
        bad = self.name == "b" and update == 1
        return original(self, batch, hidden * float("nan") if bad else hidden, update, number)

    monkeypatch.setattr(ClientSegments, "head", poisoned)
    fed = federation("a", "b", training=WAITING)
    fed.start_server(exit_when_finished=False)
    good, bad = fed.start_client("a"), fed.start_client("b")
    with pytest.raises(NonFiniteError, match="client b is not finite"):
        bad.finish()
    assert good.finish().next_step == 8


def test_a_server_failing_to_write_stops_everybody_and_goes_on_later(federation, monkeypatch):
    from fedsea.server.state import ServerStore

    fed = federation("a")
    original, calls = ServerStore.save, []

    def full(self, engine, state):
        calls.append(state.next_step)
        if state.next_step == 2 and calls.count(2) == 1:
            raise StorageError("Cannot write: the disk is full; free some space, then start again.")
        original(self, engine, state)

    monkeypatch.setattr(ServerStore, "save", full)
    server = fed.start_server()
    part = fed.start_client("a", retry_for_s=0.0)
    with pytest.raises(StorageError, match="disk is full"):
        server.finish()
    with pytest.raises(FedseaError):
        part.finish()
    fed.start_server()
    assert fed.start_client("a").finish().next_step == 6
    fed.server.finish()


# --- what does not fit --------------------------------------------------------------------------------------------


def refused(fed, error, match, **changes):
    fed.start_server()
    part = fed.start_client("a", **changes)
    with pytest.raises(error, match=match):
        part.finish()
    assert not list((fed.folder / "a").rglob("*.safetensors"))


def test_another_base_model_is_refused(federation, tmp_path):
    (tmp_path / "other").mkdir()
    other = make_checkpoint(tmp_path / "other", initializer_range=0.05)
    refused(federation("a"), ConfigError, "block.0|embedding", model=str(other))


def test_a_plan_past_the_clients_limits_is_refused(federation, tmp_path):
    settings = tmp_path / "client.toml"
    settings.write_text('[limits]\ncodecs = ["bf16"]\n')
    refused(federation("a"), ConfigError, "wire.hidden", settings=settings)


def test_no_data_files_are_refused(federation):
    refused(federation("a"), ConfigError, "--data", data=())


def test_an_empty_silo_is_refused(federation, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    refused(federation("a"), DataError, "no row", data=(empty,))


def test_other_data_than_the_run_began_with_is_refused_though_every_row_is_as_long(federation):
    fed = federation("a", training={"rounds": 2, "steps_per_round": 400})
    fed.start_server()
    part = fed.start_client("a", retry_for_s=0.0)
    part.watch.wait_for(lambda: bool(part.watch.steps))
    fed.server.stop()
    with pytest.raises(FedseaError):
        part.finish()
    fed.start_server()
    text = fed.silos["a"].read_text()
    assert "river" in text
    fed.silos["a"].write_text(text.replace("river", "water"))
    with pytest.raises(DataError, match="other data files"):
        fed.start_client("a").finish()


def test_a_server_run_folder_of_another_plan_is_refused(federation):
    fed = federation("a")
    fed.train()
    fed.plan_file.write_text(fed.plan_file.read_text().replace("seed = 5", "seed = 6"))
    with pytest.raises(ConfigError, match="seed: 6 here, 5 there"):
        fed.start_server()


def test_a_client_run_folder_of_another_run_is_refused(federation):
    fed = federation("a")
    fed.train()
    fed.start_server(run=fed.folder / "new-run")
    with pytest.raises(ConfigError, match="another run of the server"):
        fed.start_client("a").finish()


def test_a_client_that_the_plan_does_not_name_is_refused(federation, identities):
    fed = federation("a")
    fed.start_server()
    fed.silos["b"] = fed.silos["a"]
    with pytest.raises(AuthError, match="not on the server's list"):
        fed.start_client("b", retry_for_s=0.0).finish()


def test_a_revoked_client_is_sent_away_in_the_middle_of_a_run_and_the_server_says_why(
    tmp_path, base_model, caplog, monkeypatch
):
    from tests.support.federation import Federation

    own = make_identities(tmp_path / "ids", ("a", "b"))
    fed = Federation(
        tmp_path / "fed", base_model, own, ("a", "b"), {"training": {"rounds": 1, "steps_per_round": 5000}}
    )
    try:
        fed.start_server()
        parts = {name: fed.start_client(name, retry_for_s=0.0) for name in fed.names}
        parts["b"].watch.wait_for(lambda: bool(parts["b"].watch.steps))
        Authority.open(own / "ca").revoke("b", "test")
        with pytest.raises(AuthError, match="was revoked"):
            parts["b"].finish()
        assert parts["a"].is_alive()
        ended = [text for text in caplog.messages if "the stream of client b is ended" in text]
        assert len(ended) == 1
        assert "was revoked" in ended[0]
        assert fed.server.service.status()["refused"] == {"b": "revoked"}
        fed.server.service._refused.clear()  # as a server that was started again has it
        assert fed.server.service.status()["refused"] == {"b": "revoked"}, "the journal alone says so"
        with pytest.raises(AuthError, match="was revoked"):
            fed.start_client("b", retry_for_s=0.0).finish()
        assert fed.server.service._refused == {"b": "revoked"}
        monkeypatch.setattr(peers, "LOOK_EVERY_S", 0.0)  # the journal is read before the next client is looked at
        authority = Authority.open(own / "ca")
        certificate = authority.approve(enroll(own / "new", "b").csr_pem, again=True)
        install(own / "new", certificate.pem, authority.ca_pem, authority.fingerprint)
        back = fed.start_client("b", retry_for_s=0.0, identity=own / "new")
        back.watch.wait_for(lambda: bool(back.watch.steps))
        assert fed.server.service.status()["refused"] == {}
    finally:
        fed.close()
