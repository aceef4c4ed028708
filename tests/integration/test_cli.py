"""The commands against a running server: what they say, and what they leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedsea
from fedsea.cli import main
from fedsea.observe.run_log import read_lines
from tests.support.federation import Federation

SILO = Path(fedsea.__file__).parent / "assets" / "silos" / "clinic.jsonl"


pytestmark = pytest.mark.usefixtures("restored")


@pytest.fixture
def one(federation: Callable[..., Federation]) -> Federation:
    """A federation whose server runs, and stays for client "b", which never comes and is not waited for."""
    made = federation("a", "b", training={"rounds": 1, "steps_per_round": 2, "wait": 0.2})
    made.start_server()
    return made


def connected(one: Federation) -> list[str]:
    return ["--server", one.address, "--identity", str(one.identities / "a")]


def client(one: Federation) -> list[str]:
    data = ["--data", str(one.silos["a"]), "--run", str(one.folder / "a"), "--threads", "1"]
    return [*connected(one), *data]


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_a_client_from_doctor_to_export(one: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", *connected(one), "--run", str(one.folder), "--json"]) == 0
    names = {check["name"] for check in last_json(capsys)["checks"]}
    assert {"server", "clock", "plan", "limits", "model", "memory"} <= names

    assert main.run(["train", *client(one), "--json"]) == 0
    summary = last_json(capsys)
    assert summary["next_step"] == 2
    assert summary["loss_after"] < summary["loss_before"]
    kinds = [line["kind"] for line in read_lines(one.folder / "a" / "metrics.jsonl")]
    assert kinds == ["start", "evaluation", "step", "step", "evaluation"]
    assert (one.folder / "a" / "plan.json").exists()
    assert list((one.folder / "a" / "tensorboard").iterdir())

    assert main.run(["status", *connected(one), "--json"]) == 0
    assert last_json(capsys)["finished"] is True
    assert main.run(["status", *connected(one)]) == 0
    assert "2 of 2, finished" in capsys.readouterr().out

    assert main.run(["eval", *client(one), "--json"]) == 0
    held_out = last_json(capsys)
    assert (held_out["segments"], held_out["rows"]) == ("trained", "held_out")
    assert held_out["mean_loss"] == pytest.approx(summary["loss_after"], abs=1e-5)
    assert main.run(["eval", *client(one), "--all", "--json"]) == 0
    assert last_json(capsys)["num_target_tokens"] > held_out["num_target_tokens"]
    assert main.run(["eval", *client(one), "--base", "--run", str(one.folder / "none")]) == 0
    assert (
        "tokens of the rows that a training on these files would hold out, with the base model's own segments"
        in capsys.readouterr().out
    )

    out = one.folder / "adapter"
    assert main.run(["export", *connected(one), "--run", str(one.folder / "a"), "--out", str(out)]) == 0
    assert (out / "adapter_model.safetensors").exists()
    at_operator = one.folder / "operators"
    assert main.run(["export", "--server-run", str(one.folder / "server"), "--out", str(at_operator), "--json"]) == 0
    assert last_json(capsys)["out"] == str(at_operator)
    assert (at_operator / "adapter_config.json").exists()


def test_a_finished_run_ends_at_once_in_a_sentence(one: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["train", *client(one), "--quiet", "--no-eval"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1, "even a quiet run says what it relies on, and nothing else"
    assert "Trust mode: trusted-server" in shown.err
    assert main.run(["train", *client(one), "--no-eval"]) == 0
    shown = capsys.readouterr()
    assert "This run is finished (2 steps)" in shown.out
    assert "fedsea generate" in shown.out, "what can be done now is said"


def test_training_alone_needs_no_server(
    federation: Callable[..., Federation], capsys: pytest.CaptureFixture[str]
) -> None:
    alone = federation("a", "b", training={"rounds": 1, "steps_per_round": 2})
    given = ["--alone", "--plan", str(alone.plan_file), "--name", "a", "--run", str(alone.folder / "alone")]
    assert main.run(["train", *given, "--data", str(alone.silos["a"]), "--threads", "1"]) == 0
    shown = capsys.readouterr()
    assert "Finished after 2 steps; held-out loss" in shown.out
    assert "fedsea generate" not in shown.out, "what was trained alone has no server to answer"
    assert "a: step 2/2" in shown.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--data", "x.jsonl"], "--server HOST:PORT"),
        (["train", "--alone", "--data", str(SILO)], "--plan"),
        (["train", "--server", "h:1", "--plan", "p.toml", "--data", str(SILO)], "--alone"),
        (["train", "--server", "h:1", "--field", "response"], "ROLE=COLUMN"),
        (["train", "--server", "h:1", "--field", "text=a", "--field", "text=b"], "twice"),
        (["train", "--server", "h:1", "--device", "tpu"], "cuda"),
        (["eval"], "--server HOST:PORT"),
        (["status"], "--server HOST:PORT"),
        (["export"], "--server HOST:PORT"),
        (["export", "--server-run", "r", "--server", "h:1"], "stands alone"),
        (["server", "--plan", "none.toml"], "fedsea init"),
        (["server", "--plan", "none.toml", "--metrics", "nowhere"], "no address for metrics"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_done(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run(arguments) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
