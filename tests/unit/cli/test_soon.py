"""Mistakes in a command line are told before torch is loaded, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.assets import toml

_RUN = """
import contextlib, io, json, sys
from fedsea.cli.main import run
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
        code = run(arguments)
    heavy = [name for name in ("torch", "grpc", "transformers", "pyarrow") if name in sys.modules]
    print(json.dumps([code, heavy, told.getvalue()]))
"""

_WITH_SERVER = ("train", "eval", "generate", "chat", "gateway", "export", "status", "doctor")

_ALONE = ("train", "--alone", "--plan", "plan.toml", "--name", "a", "--data")

_WRONG: dict[str, tuple[int, list[str], str]] = {
    **{f"address of {name}": (2, [name, "--server", "nonsense"], "write HOST:PORT") for name in _WITH_SERVER},
    "port": (2, ["train", "--server", "h:70000"], "1 to 65535"),
    "option": (2, ["train", "--bad-option"], "--bad-option"),
    "no server": (2, ["train"], "--server HOST:PORT"),
    "no data": (2, ["train", "--server", "h:1"], "--data"),
    "data": (3, ["train", "--server", "h:1", "--data", "none.jsonl"], "no file none.jsonl"),
    "kind of data": (3, ["train", "--server", "h:1", "--data", "plan.toml"], "no known kind of file"),
    "format": (2, ["train", "--server", "h:1", "--data", "a.csv", "--format", "odd"], "no data format"),
    "settings": (2, ["train", "--server", "h:1", "--data", "a.csv", "--settings", "none.toml"], "no file none.toml"),
    "device": (2, ["train", "--server", "h:1", "--data", "a.csv", "--device", "tpu"], "use cpu"),
    "identity": (2, ["train", "--server", "h:1", "--data", "a.csv"], "no file identity/ca.pem"),
    "alone": (2, ["train", "--alone", "--data", "a.csv", "--plan", "none.toml", "--name", "a"], "no file none.toml"),
    "name alone": (
        2,
        ["train", "--alone", "--data", "a.csv", "--plan", "plan.toml", "--name", "nobody"],
        "no client 'nobody': name one that it has (a).",
    ),
    "empty silo": (3, [*_ALONE, "a.csv"], "There is no row in a.csv"),
    "cut-off row": (3, [*_ALONE, "cut.jsonl"], "cut.jsonl, line 1: the row ends within its JSON object"),
    "skipped row": (3, [*_ALONE, "cut.jsonl", "--skip-bad-rows"], "cut.jsonl, line 2: the row has the columns of no"),
    "role": (3, [*_ALONE, "cut.jsonl", "--skip-bad-rows", "--format", "text"], "with --field ROLE=COLUMN"),
    **{f"run of {name}": (2, [name, "--server", "h:1", "--run", "r"], "no folder r") for name in ("chat", "export")},
    "identity of chat": (2, ["chat", "--server", "h:1", "--base"], "no file identity/ca.pem"),
    "drafter": (2, ["chat", "--server", "h:1", "--drafter", "x"], "--drafter"),
    "sampling": (
        2,
        ["generate", "the", "--server", "h:1", "--base", "--top-p", "5"],
        "top_p must be over 0 and at most",
    ),
    "sampling of chat": (2, ["chat", "--server", "h:1", "--base", "--min-p", "-1"], "min_p must be"),
    "stop": (2, ["generate", "the", "--server", "h:1", "--base", "--stop", ""], "--stop is empty"),
    "key of the gateway": (2, ["gateway", "--server", "h:1", "--host", "0.0.0.0"], "needs an API key"),
    "run of the server": (2, ["export", "--server-run", "r"], "no folder r"),
    "folder of an export": (2, ["export", "--server", "h:1", "--out", "."], "choose another folder with --out"),
    "file of an export": (2, ["export", "--server-run", ".", "--out", "a.csv"], "a.csv is a file"),
    "plan": (2, ["server", "--plan", "none.toml"], "no file none.toml"),
    "listen": (2, ["server", "--listen", "nonsense"], "no address to listen on"),
    "metrics": (2, ["server", "--metrics", "nonsense"], "no address for metrics"),
    "identity of the server": (2, ["server", "--listen", "127.0.0.1:0"], "no file ca/server/ca.pem"),
    "plan of an audit": (2, ["audit", "none.toml"], "give a plan file or a run folder"),
    "settings of an audit": (2, ["audit", "plan.toml", "--settings", "none.toml"], "give this client's own settings"),
    "text of an audit": (3, ["audit", "plan.toml", "--text", "none.txt"], "no file none.txt"),
    "attacks of an audit": (2, ["audit", "plan.toml", "--attacks", "A77"], "no attack A77"),
    "minutes of an audit": (2, ["audit", "plan.toml", "--minutes", "0"], "a number above 0"),
    "ledger": (2, ["ledger", "none"], "no folder none"),
    "quickstart": (2, ["quickstart", "--folder", "."], "not empty"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str], str]]:
    """Exit code, heavy modules that are loaded by then, and what was said, of each; all in one process."""
    folder = tmp_path_factory.mktemp("soon")
    (folder / "a.csv").write_text("text\n")
    (folder / "cut.jsonl").write_text('{"text": "cut\n{"body": "b"}\n')
    (folder / "plan.toml").write_text(toml({"model": {"path": "m"}, "clients": [{"name": "a"}]}))
    asked = json.dumps([arguments for _, arguments, _ in _WRONG.values()])
    found = subprocess.run(
        [sys.executable, "-c", _RUN, asked], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return dict(zip(_WRONG, (tuple(json.loads(line)) for line in found), strict=True))


@pytest.mark.parametrize("name", _WRONG)
def test_mistakes_are_told_in_a_sentence_and_before_torch_is_loaded(
    told: dict[str, tuple[int, list[str], str]], name: str
) -> None:
    code, _, words = _WRONG[name]
    assert told[name][0] == code
    assert words in told[name][2]
    assert told[name][1] == []
    if name != "option":  # that is click's own form
        assert told[name][2].startswith("Error: ")
        assert told[name][2].count("\n") == 1
