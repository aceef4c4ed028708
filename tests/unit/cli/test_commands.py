"""What the commands make of their options."""

import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsea.audit.quick import QuickTable, TableRow
from fedsea.cli import main
from fedsea.cli import quickstart as cli_quickstart
from fedsea.client import run as client_run
from fedsea.client.run import TrainSummary
from fedsea.client.setup import ClientOptions
from fedsea.client.trainer import EvaluationReport, StepReport
from fedsea.errors import ConfigError
from fedsea.evaluation import quickstart
from fedsea.observe import metrics
from fedsea.server import run as server_run
from fedsea.server.run import ServerOptions
from tests.support.assets import toml

pytestmark = pytest.mark.usefixtures("without_folders")


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the Python calls were called with, by name."""
    seen: dict[str, Any] = {}

    def train(options: ClientOptions, observer: Any) -> TrainSummary:
        seen["train"], seen["observer"] = options, observer
        return TrainSummary("a", 7, 70, None, None, 0, 0, {}, {})

    def serve(options: ServerOptions, watch: Any) -> None:
        seen["serve"] = options
        status = {"next_step": 3, "num_steps": 9, "rounds_done": 0, "connected": ["a"], "waiting_for": []}
        watch(status | {"target_tokens": 5, "bytes_sent": 1, "bytes_received": 2})

    monkeypatch.setattr(client_run, "train", train)
    monkeypatch.setattr(server_run, "serve", serve)
    monkeypatch.setattr(metrics, "serve_metrics", lambda *_: nullcontext())
    return seen


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the working folder, which is empty otherwise: what the command lines name."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("question,answer\na,b\n")
    (tmp_path / "s.toml").write_text("[limits]\n")


@pytest.mark.usefixtures("files", "stubbed")
@pytest.mark.parametrize(
    ("found", "steps", "said"),
    [
        (None, 0, "Interrupted.\n"),
        ("step-00000000.safetensors", 0, "Interrupted.\n"),
        (None, 1, "Interrupted. What was applied is kept in run: "),
        ("step-00000003.safetensors", 0, "Interrupted. What was applied is kept in run: "),
    ],
)
def test_train_says_that_what_was_applied_is_kept_if_anything_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: str | None, steps: int, said: str
) -> None:
    def train(_options: ClientOptions, observer: Any) -> None:
        for number in range(steps):
            observer.step(StepReport(number, 0, 9, 1.0, 5, 5, {}))
        raise KeyboardInterrupt

    monkeypatch.setattr(client_run, "train", train)
    if found is not None:
        (Path("run") / "checkpoints").mkdir(parents=True)
        (Path("run") / "checkpoints" / found).write_text("")
    assert main.run(["train", "--server", "h:1", "--data", "a.csv", "--run", "run", "--quiet"]) == 130
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("steps", "said"), [((0, 9), "2.5000 → 1.5000."), ((3, 9), "2.5000 → 1.5000 since step 3.")])
def test_the_loss_of_a_resumed_training_says_since_when(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: tuple[int, int], said: str
) -> None:
    recorder = client_run._Recorder(None)
    for step, loss in zip(steps, (2.5, 1.5), strict=True):
        recorder.evaluation(EvaluationReport(step, loss, 5))
    monkeypatch.setattr(client_run, "train", lambda *_: recorder.summary("a", 9, ({}, {})))
    assert main.run(["train", "--server", "h:1", "--data", "a.csv", "--run", "run"]) == 0
    assert f"held-out loss {said}" in capsys.readouterr().out


@pytest.mark.usefixtures("files")
def test_train_hands_every_option_on(stubbed: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["train", "--server", "h:1", "--identity", "me", "--data", "a.csv", "b.csv", "--model", "m"]
    arguments += ["--run", str(tmp_path), "--settings", "s.toml", "--format", "instruction"]
    arguments += ["--field", "response=answer", "--field", "input=note", "--skip-bad-rows"]
    arguments += ["--threads", "2", "--no-eval", "--retry-for", "5", "--quiet"]
    assert main.run(arguments) == 0
    assert stubbed["train"] == ClientOptions(
        server="h:1",
        identity=Path("me"),
        data=(Path("a.csv"), Path("b.csv")),
        run=tmp_path,
        model="m",
        settings=Path("s.toml"),
        format="instruction",
        fields={"response": "answer", "input": "note"},
        threads=2,
        device="cpu",
        evaluate=False,
        retry_for_s=5.0,
        skip_bad_rows=True,
    )


@pytest.mark.usefixtures("files")
def test_train_leaves_defaults_as_the_python_call_has_them(stubbed: dict[str, Any]) -> None:
    assert main.run(["train", "--server", "h:1", "--data", "a.csv", "--quiet"]) == 0
    assert stubbed["train"] == ClientOptions(server="h:1", identity=Path("identity"), data=(Path("a.csv"),))


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--data"),
        (["--data", "none.csv"], 3, "no file none.csv"),
        (["--data", "."], 3, "is a folder"),
        (["--data", "s.toml"], 3, "no known kind of file"),
        (["--data", "a.csv", "a.csv"], 3, "named twice"),
        (["--data", "a.csv", "--settings", "none.toml"], 2, "no file none.toml"),
        (["--data", "a.csv", "--format", "odd"], 2, "no data format 'odd'"),
        (["--data", "a.csv", "--format", "text", "--field", "response=x"], 2, "no role response"),
        (["--data", "a.csv", "--device", "tpu"], 2, "use cpu"),
    ],
)
def test_arguments_are_checked_before_a_connection_is_made(
    stubbed: dict[str, Any], arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("train", "eval"):
        assert main.run([command, "--server", "h:1", *arguments]) == code
        assert says in capsys.readouterr().err
    assert not stubbed


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(toml({"model": {"path": "m"}, "clients": [{"name": "a"}]}))
    return path


def served(plan_file: Path, folder: Path) -> list[str]:
    """A server's command line, on whatever port of loopback is free."""
    return ["server", "--plan", str(plan_file), "--listen", "127.0.0.1:0", "--run", str(folder / "run")]


def test_server_hands_every_option_on(
    stubbed: dict[str, Any], tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["server", "--plan", str(plan_file), "--listen", "127.0.0.1:0", "--identity", "me", "--ca", "authority"]
    arguments += ["--run", str(tmp_path / "run"), "--threads", "3", "--exit-when-finished", "--ready-file", "ready"]
    assert main.run([*arguments, "--json"]) == 0
    assert stubbed["serve"] == ServerOptions(
        plan=plan_file,
        listen="127.0.0.1:0",
        identity=Path("me"),
        ca=Path("authority"),
        run=tmp_path / "run",
        threads=3,
        device="cpu",
        exit_when_finished=True,
        ready_file=Path("ready"),
    )
    assert '"next_step": 3' in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_server_says_that_it_loads_before_it_does(
    plan_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fedsea.server.run", None)  # what loads torch cannot be loaded
    asked = ["server", "--plan", str(plan_file), "--listen", "127.0.0.1:0"]
    for quiet in ([], ["--quiet"]):
        assert main.run([*asked, *quiet]) == main.INTERNAL
        assert ("starting: loading torch" in capsys.readouterr().err) == (not quiet)


def test_the_servers_identity_is_in_the_authoritys_folder_by_default(
    stubbed: dict[str, Any], tmp_path: Path, plan_file: Path
) -> None:
    assert main.run([*served(plan_file, tmp_path), "--ca", "authority"]) == 0
    assert stubbed["serve"].identity == Path("authority/server")


@pytest.fixture
def metrics_asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Where metrics were to be served; the default is taken already."""
    asked: list[tuple[str, int]] = []

    @contextmanager
    def endpoint(host: str = metrics.DEFAULT_HOST, port: int = metrics.DEFAULT_PORT) -> Any:
        asked.append((host, port))
        if port == 9464:
            raise ConfigError("Metrics cannot be served there.")
        yield None

    monkeypatch.setattr(metrics, "serve_metrics", endpoint)
    return asked


@pytest.mark.parametrize(
    ("option", "where"),
    [
        ([], [("127.0.0.1", 9464)]),
        (["--metrics", "127.0.0.1:1234"], [("127.0.0.1", 1234)]),
        (["--metrics", "[::1]:1234"], [("::1", 1234)]),
        (["--metrics", "off"], []),
    ],
)
def test_metrics_are_served_on_loopback_or_where_asked(
    stubbed: dict[str, Any],
    tmp_path: Path,
    plan_file: Path,
    metrics_asked: list[tuple[str, int]],
    option: list[str],
    where: list[tuple[str, int]],
) -> None:
    arguments = [*served(plan_file, tmp_path), *option]
    assert main.run(arguments) == 0
    assert metrics_asked == where


def test_a_default_port_of_metrics_in_use_is_one_warning(
    stubbed: dict[str, Any],
    tmp_path: Path,
    plan_file: Path,
    metrics_asked: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*served(plan_file, tmp_path), "--quiet"]
    assert main.run(arguments) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Metrics cannot be served there. The run goes on without metrics.")


def test_a_port_of_metrics_that_was_asked_for_must_be_free(
    stubbed: dict[str, Any], tmp_path: Path, plan_file: Path, metrics_asked: list[str]
) -> None:
    arguments = [*served(plan_file, tmp_path), "--metrics", "127.0.0.1:9464"]
    assert main.run(arguments) == 2
    assert "serve" not in stubbed


@pytest.mark.parametrize(
    ("ended", "below"),
    [("stop", "\n    A B\n    C\n"), ("length", "\n    A B\n    C …\n\n    (cut off after 60 tokens)\n")],
    ids=["stop", "length"],
)
def test_quickstart_shows_losses_bytes_times_sample_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ended: str, below: str
) -> None:
    by_silo = {"clinic": 1.0, "bank": 2.0}
    models = {"base": by_silo, "clinic": by_silo, "bank": by_silo, "central": by_silo, "federated": by_silo}

    def run(
        options: quickstart.QuickstartOptions,
        progress: quickstart.Progress,
        present: Any,
        show: Any,
        audit: Any,
        begun: Any,
    ) -> quickstart.QuickstartResult:
        assert options == quickstart.QuickstartOptions(tmp_path / "q", 4)
        for step in range(24):
            progress("federation", step + 1, 24)
        val_loss = {"base": 3.5, "alone": {"clinic": 3.25, "bank": 3.125}, "central": 2.5, "federated": 2.5625}
        found = quickstart.QuickstartResult(
            val_loss, models, {"Forward": 2_000_000}, {"trunk": 4.0}, {"federation": 5.0},
            {"prompt": "Q?\ntwo lines\n", "answer": "", "through": "gateway", "finish_reason": ""},
            tmp_path / "report.html",
        )  # fmt: skip
        present(found)
        for piece in ("\n", " A", " B", "\nC"):
            show(piece)
        cells = audit(replace(found, sample=found.sample | {"finish_reason": ended}))
        assert cells[1] == ("trusted-server", "hidden (A1)", "100 %", "25 %", "50 %")
        return replace(found, seconds=found.seconds | {"all": 9.0})

    monkeypatch.setattr(quickstart, "run", run)
    row = TableRow("trusted-server", "hidden", "A1", 1.0, 0.25, 0.5, 7.0)
    monkeypatch.setattr(cli_quickstart, "_audited", lambda folder: QuickTable((row,) * (folder == tmp_path / "q"), ()))
    assert main.run(["quickstart", "--folder", str(tmp_path / "q"), "--steps", "4"]) == 0
    shown = capsys.readouterr()
    for part in ("federated", "2.5625", "clinic alone", "3.2500", "hidden states to the server", "2.00 MB"):
        assert part in shown.out
    for part in ("summed over the clients", "waiting for the trunk", "    Q?\n    two lines\n", "report.html"):
        assert part in shown.out
    assert shown.out.index("federated") < shown.out.index("central")
    for part in ("What the server could have read", "hidden (A1)", "100 %", "25 %", "50 %", "fedsea audit"):
        assert part in shown.out
    assert shown.out.count("9.0") == 1
    assert "to here the quickstart took 9.0 s." in shown.out
    assert "through `fedsea gateway`" in shown.out
    assert below in shown.out
    said = "reach a validation loss of 2.562 over everybody's text; trained on all text in one place it is 2.500"
    assert f"{said}, trained alone 3.125 to 3.250, and untrained 3.500." in shown.out
    for part in ("left out", "cut off" if ended == "stop" else "A B\n    C\n"):
        assert part not in shown.out
    assert [line.split(", ")[:2] for line in shown.err.splitlines()] == [
        ["federation: 1 of 24", "under way"],
        ["federation: 10 of 24", "under way"],
        ["federation: 20 of 24", "under way"],
        ["federation: 24 of 24", "done"],
        ["Attacking planted notes", "sent as the clinic sends its text"],
    ]


def test_status_says_why_a_client_is_not_let_in(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsea.cli.status import _show

    answer: dict[str, Any] = {
        **{"federation": "f", "run_id": "r", "version": "1", "trust_mode": "trusted-server", "finished": False},
        **{"next_step": 1, "num_steps": 2, "rounds_done": 0, "rounds": 1, "bytes_received": 0, "bytes_sent": 0},
        **{"clients": ["bank"], "connected": [], "waiting_for": ["bank"], "refused": {"bank": "revoked"}},
    }
    _show(answer)
    assert "not connected (revoked), the step waits for it" in capsys.readouterr().out


def test_status_says_of_a_client_that_does_not_train_that_it_uses_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsea.cli.status import _show

    answer: dict[str, Any] = {
        **{"federation": "f", "run_id": "r", "version": "1", "trust_mode": "trusted-server", "finished": False},
        **{"next_step": 1, "num_steps": 2, "rounds_done": 0, "rounds": 1, "bytes_received": 0, "bytes_sent": 0},
        "clients": ["bank", "clinic", "court"],
        **{"connected": ["bank"], "using": ["bank", "clinic"], "waiting_for": []},
    }
    _show(answer)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "connected" in line]
    assert [row[2].strip() for row in rows] == [
        "connected, uses the model",
        "not connected to train, uses the model",
        "not connected",
    ]


def test_status_says_how_many_wait_for_room() -> None:
    from fedsea.cli.status import _inference

    now = {"sessions": 2, "sequences": 3, "kv_bytes": 0, "kv_bytes_limit": 1, "tokens": 0}
    assert "2 sessions with 3 sequences, 4 waiting for room, " in _inference(now | {"waiting": 4})
    for none in (now, now | {"waiting": 0}):
        assert "waiting" not in _inference(none)
