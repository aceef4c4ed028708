"""What a run is good for when it has ended: evaluation, export, status, and being asked again."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsea.client import results
from fedsea.client import run as client_run
from fedsea.errors import ConfigError, DataError, TransportError
from fedsea.server.run import export_run
from tests.support.assets import NUM_BLOCKS, write_silo


def test_evaluation_and_export_give_the_federations_loss(federation, base_model):
    """The exported adapter, in plain peft on the whole model, has the held-out loss that the split model has."""
    from peft import PeftModel
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    from fedsea.client import setup
    from fedsea.model.checkpoint import open_checkpoint
    from fedsea.types import IGNORE

    fed = federation("a", "b")
    server = fed.start_server(exit_when_finished=False)
    for part in [fed.start_client(name, evaluate=True) for name in fed.names]:
        summary = part.finish()
    options = fed.client_options("b")
    evaluated = results.evaluate(options)
    assert evaluated.mean_loss == pytest.approx(summary.loss_after, rel=1e-6)
    assert evaluated.perplexity == pytest.approx(math.exp(evaluated.mean_loss))
    everything = results.evaluate(options, everything=True)
    assert everything.num_target_tokens > evaluated.num_target_tokens
    untrained = results.evaluate(replace(options, run=fed.folder / "none"), base=True)
    assert untrained.mean_loss > evaluated.mean_loss
    assert (evaluated.segments, untrained.segments) == ("trained", "base")
    assert (evaluated.rows, everything.rows, untrained.rows) == ("held_out", "all", "unchecked")
    for base in (False, True):
        with pytest.raises(DataError, match=r"not the files that the run .* is trained on.*--all"):
            results.evaluate(replace(options, data=(fed.silos["a"],)), base=base)
    results.export_adapter(options, fed.folder / "at-client")
    export_run(fed.folder / "server", fed.folder / "at-server")
    server.stop()

    checkpoint = open_checkpoint(str(base_model))
    batches = list(setup.held_out(fed.plan, setup.open_data(fed.plan, checkpoint, options), "b"))
    for out in ("at-client", "at-server"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), str(fed.folder / out))
        total = 0.0
        with torch.no_grad():
            for batch in batches:
                for ids, targets in zip(
                    batch.input_ids_T.split(batch.lengths), batch.targets_T.split(batch.lengths), strict=True
                ):
                    logits = model(ids[None]).logits[0]
                    total += float(F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE))
        assert total / evaluated.num_target_tokens == pytest.approx(evaluated.mean_loss, rel=1e-5)


def test_the_server_says_how_it_stands(federation):
    fed = federation("a")
    server = fed.start_server(exit_when_finished=False)
    assert results.status(fed.address, fed.identities / "a")["next_step"] == 0
    fed.start_client("a").finish()
    status = results.status(fed.address, fed.identities / "a")
    assert (status["next_step"], status["finished"], status["clients"]) == (6, True, ["a"])
    assert status["bytes_received"] > 0
    server.stop()


def test_a_finished_run_is_told_from_the_folder_and_sends_nothing_again(federation):
    fed = federation("a")
    server = fed.start_server(exit_when_finished=False)
    first = fed.start_client("a", evaluate=True).finish()
    received = server.service.status()["bytes_received_by_kind"]
    again = fed.start_client("a", evaluate=True, data=())
    assert again.finish() == replace(first, finished_before=True)
    assert not again.watch.steps
    assert not again.watch.evaluations
    server.stop()
    now = server.service.status()["bytes_received_by_kind"]
    assert {kind for kind, count in now.items() if count != received.get(kind)} <= {"Hello", "Join", "Finished"}


def test_a_client_whose_run_is_finished_says_goodbye_to_a_server_that_was_started_again(federation):
    fed = federation("a")
    fed.train()
    server = fed.start_server()
    assert fed.start_client("a").finish().finished_before
    server.finish()


def test_evaluation_reads_the_files_as_training_was_told_to(federation):
    fed = federation("a", training={"rounds": 1, "steps_per_round": 1})
    fed.silos["a"].write_text(fed.silos["a"].read_text().replace('"text"', '"note"'))
    server = fed.start_server(exit_when_finished=False)
    fed.start_client("a", format="text", fields={"text": "note"}).finish()
    options = fed.client_options("a")
    assert results.evaluate(options).num_target_tokens > 0
    with pytest.raises(DataError, match="no known format"):
        results.evaluate(options, base=True)
    server.stop()


def test_a_finished_run_needs_no_server_to_say_so(federation):
    fed = federation("a")
    summary = fed.train()["a"].result
    assert fed.start_client("a").finish() == replace(summary, finished_before=True)


def test_a_folder_of_somebody_else_is_no_answer_when_the_server_is_away(federation):
    fed = federation("a", "b")
    fed.train()
    options = replace(fed.client_options("b"), run=fed.folder / "a", retry_for_s=0.1)
    with pytest.raises(TransportError):
        client_run.train(options)


def test_a_note_of_the_end_of_another_version_counts_for_nothing(federation):
    fed = federation("a")
    fed.train()
    note = fed.folder / "a" / "summary.json"
    values = json.loads(note.read_text())
    values["summary"]["of_a_later_version"] = 1
    note.write_text(json.dumps(values))
    with pytest.raises(TransportError):
        client_run.train(replace(fed.client_options("a"), retry_for_s=0.1))


def test_a_finished_run_alone_is_told_from_its_folder(federation):
    fed = federation("a")
    options = fed.client_options("a")
    summary = client_run.train_alone(fed.plan_file, "a", options)
    assert client_run.train_alone(fed.plan_file, "a", replace(options, data=())) == replace(
        summary, finished_before=True
    )


def test_a_run_goes_on_with_a_base_model_that_was_moved(federation, base_model, tmp_path):
    fed = federation("a")
    fed.train()
    alone = fed.client_options("a", run=fed.folder / "alone")
    client_run.train_alone(fed.plan_file, "a", alone)
    moved = shutil.copytree(base_model, tmp_path / "moved")
    fed.plan_file.write_text(fed.plan_file.read_text().replace(str(base_model), str(moved)))
    fed.start_server()
    assert fed.start_client("a").finish().finished_before
    assert client_run.train_alone(fed.plan_file, "a", alone).finished_before


def test_results_of_another_run_are_refused(federation):
    fed = federation("a")
    fed.train()
    server = fed.start_server(run=fed.folder / "new-run", exit_when_finished=False)
    options = fed.client_options("a")
    with pytest.raises(ConfigError, match="another run of the server"):
        results.evaluate(options)
    with pytest.raises(ConfigError, match="another run of the server"):
        results.export_adapter(options, fed.folder / "out")
    server.stop()
    assert not (fed.folder / "out").exists()


def test_results_need_a_run_folder_and_the_clients_own(federation):
    fed = federation("a", "b", clients={"b": {"input_blocks": 2}})
    server = fed.start_server(exit_when_finished=False)
    for part in [fed.start_client(name) for name in fed.names]:
        part.finish()
    none = fed.client_options("a", run=fed.folder / "none")
    with pytest.raises(ConfigError, match=r"holds no training run.*--base"):
        results.evaluate(none)
    with pytest.raises(ConfigError, match="holds no training run"):
        results.export_adapter(none, fed.folder / "out")
    with pytest.raises(ConfigError, match="that of client b, and this is a"):
        results.evaluate(fed.client_options("a", run=fed.folder / "b"))
    server.stop()


def test_a_folder_that_is_behind_the_trunk_is_evaluated_with_a_warning_and_not_exported(federation, caplog):
    fed = federation("a")
    server = fed.start_server(exit_when_finished=False)
    fed.start_client("a").finish()
    (fed.folder / "a" / "checkpoints" / "step-00000006.safetensors").unlink()
    results.evaluate(fed.client_options("a"))
    assert "is at step 5 and the server's trunk that answers here at step 6" in caplog.text
    with pytest.raises(ConfigError, match="behind the server's trunk: it is at step 5"):
        results.export_adapter(fed.client_options("a"), fed.folder / "out")
    server.stop()
    assert not (fed.folder / "out").exists()


def test_a_client_without_blocks_trains_and_is_exported(federation, base_model):
    from safetensors.torch import load_file

    fed = federation("a", partition={"input_blocks": 0, "output_blocks": 0})
    server = fed.start_server(exit_when_finished=False)
    summary = fed.start_client("a", evaluate=True).finish()
    assert summary.loss_after < summary.loss_before
    results.export_adapter(fed.client_options("a"), fed.folder / "at-client")
    export_run(fed.folder / "server", fed.folder / "at-server")
    server.stop()
    ours, theirs = (load_file(fed.folder / out / "adapter_model.safetensors") for out in ("at-client", "at-server"))
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in ours} == set(range(NUM_BLOCKS))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_nothing_held_out_is_no_reason_not_to_train_but_cannot_be_evaluated(federation, caplog):
    fed = federation("a", data={"holdout": 0.0})
    server = fed.start_server(exit_when_finished=False)
    summary = fed.start_client("a", evaluate=True).finish()
    assert (summary.next_step, summary.loss_before, summary.loss_after) == (6, None, None)
    assert "Nothing is held out" in caplog.text
    with pytest.raises(DataError, match=r"nothing to evaluate.*--all"):
        results.evaluate(fed.client_options("a"))
    assert results.evaluate(fed.client_options("a"), everything=True).num_target_tokens > 0
    server.stop()


@pytest.mark.parametrize(
    ("before", "after"), [("rank = 4", "rank = 2"), ('name = "a"', 'name = "a"\ninput_blocks = 2')]
)
def test_a_run_alone_with_another_cut_or_rank_says_what_differs(federation, before, after):
    fed = federation("a", training={"rounds": 1, "steps_per_round": 1})
    options = fed.client_options("a")
    client_run.train_alone(fed.plan_file, "a", options)
    text = fed.plan_file.read_text()
    assert before in text
    fed.plan_file.write_text(text.replace(before, after))
    with pytest.raises(ConfigError, match=r"started with another plan \(.*(rank|input_blocks).* new folder"):
        client_run.train_alone(fed.plan_file, "a", options)


def test_a_finished_run_is_no_answer_for_other_files_with_or_without_a_server(federation):
    fed = federation("a", training={"rounds": 1, "steps_per_round": 1})
    fed.train()
    alone = fed.client_options("a", run=fed.folder / "alone")
    client_run.train_alone(fed.plan_file, "a", alone)
    other = (write_silo(fed.folder / "other.jsonl", "somebody"),)
    server = fed.start_server(exit_when_finished=False)
    with pytest.raises(ConfigError, match=r"not those of the finished run.*--run a new folder"):
        client_run.train(fed.client_options("a", data=other))
    with pytest.raises(ConfigError, match="not those of the finished run"):
        client_run.train_alone(fed.plan_file, "a", replace(alone, data=other))
    server.stop()
    with pytest.raises(ConfigError, match="not those of the finished run"):
        client_run.train(fed.client_options("a", data=other))
    moved = (shutil.copy(fed.silos["a"], fed.folder / "moved.jsonl"),)
    assert client_run.train(fed.client_options("a", data=moved)).finished_before


def test_a_finished_run_is_no_answer_for_another_base_model(federation, base_model, tmp_path):
    fed = federation("a", training={"rounds": 1, "steps_per_round": 1})
    fed.train()
    server = fed.start_server(exit_when_finished=False)
    other = shutil.copytree(base_model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="base model"):
        client_run.train(fed.client_options("a", model=str(other)))
    server.stop()
