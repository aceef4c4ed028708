"""`fedsea generate`: what becomes of its options, what it reads, what it writes."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsea.cli import main
from fedsea.client import inference
from fedsea.client.generation import GenerationSettings, generate
from fedsea.client.inference import OpenedDecoder
from fedsea.data.prompts import PromptMaker
from fedsea.data.templates import instruction_prompt
from tests.support.opened import open_local, pages

LOADING = "Loading the libraries, which takes some seconds.\n"
BASIC = ["generate", "--server", "h:1"]
pytestmark = pytest.mark.usefixtures("without_folders")


@pytest.fixture(scope="module")
def opened(base_model: Path) -> OpenedDecoder:
    return open_local(base_model)


@pytest.fixture
def seen(opened: OpenedDecoder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the model was opened with; it is opened without a server."""
    asked: dict[str, Any] = {}

    @contextlib.contextmanager
    def local(options: Any, *, base: bool = False, tell: Any) -> Iterator[OpenedDecoder]:
        asked.update(options=options, base=base)
        yield opened

    monkeypatch.setattr(inference, "open_decoder", local)
    return asked


def expected(opened: OpenedDecoder, prompt: str, **settings: Any) -> str:
    """The answer by the Python call, decoded at once."""
    chosen = GenerationSettings(**{"max_new_tokens": 12, "stop_tokens": opened.stop_tokens, **settings})
    with generate(opened.decoder, PromptMaker(opened.tokenizer).text(prompt), chosen) as generation:
        return opened.tokenizer.decode([token.id for token in generation], skip_special_tokens=True)


def run(*arguments: str) -> int:
    return main.run([*BASIC, "--max-new-tokens", "12", *arguments])


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.usefixtures("seen")
def test_the_answer_goes_to_stdout_and_its_memory_is_given_back(
    opened: OpenedDecoder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("the ship") == 0
    shown = capsys.readouterr()
    assert shown.out == expected(opened, "the ship") + "\n"
    assert shown.err == LOADING
    assert pages(opened) == [0, 0, 0]


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize("source", ["argument", "file", "pipe", "dash"])
def test_a_prompt_comes_from_the_argument_a_file_or_standard_input(
    source: str,
    opened: OpenedDecoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompt.txt").write_bytes("der rote Müller\r\n".encode())
    piped(monkeypatch, "der rote Müller\n".encode())
    arguments = {
        "argument": ["der rote Müller"],
        "file": ["--file", str(tmp_path / "prompt.txt")],
        "pipe": [],
        "dash": ["-"],
    }
    assert run(*arguments[source]) == 0
    assert capsys.readouterr().out == expected(opened, "der rote Müller") + "\n"


def test_options_reach_the_client_and_the_sampler(
    seen: dict[str, Any], opened: OpenedDecoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--identity", "me", "--run", str(tmp_path), "--base", "--threads", "2", "--retry-for", "5", "--model", "m"]
    sampled = ["--temperature", "1.2", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--seed", "3"]
    assert run("the", *given, *sampled, "--repetition-penalty", "1.1") == 0
    options = seen["options"]
    assert (options.server, options.identity, options.run, options.model) == ("h:1", Path("me"), tmp_path, "m")
    assert (options.threads, options.retry_for_s, options.data, seen["base"]) == (2, 5.0, (), True)
    chosen = {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 3, "repetition_penalty": 1.1}
    assert capsys.readouterr().out == expected(opened, "the", **chosen) + "\n"


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize("drafter", ["none", "early-exit", "folder"])
def test_a_drafter_changes_no_answer(
    drafter: str, opened: OpenedDecoder, base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("the ship", "--drafter", str(base_model) if drafter == "folder" else drafter) == 0
    assert capsys.readouterr().out == expected(opened, "the ship") + "\n"


@pytest.mark.usefixtures("seen")
def test_json_is_one_line_with_text_counts_reason_and_figures(
    opened: OpenedDecoder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("the ship", "--json", "--drafter", "none") == 0
    (line,) = capsys.readouterr().out.splitlines()
    document = json.loads(line)
    assert document["text"] == expected(opened, "the ship")
    assert (document["finish_reason"], document["new_tokens"]) == ("length", 12)
    assert document["prompt_tokens"] == len("the ship")
    figures = document["stats"]
    assert (figures["round_trips"], figures["drafted"], figures["accepted"]) == (12, 0, 0)
    assert 0 < figures["first_token_s"] < figures["seconds"]
    assert figures["tokens_per_s"] > 0


@pytest.mark.usefixtures("seen")
def test_without_a_length_the_answer_is_as_long_as_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*BASIC, "the ship", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prompt_tokens"] + document["new_tokens"] == 128
    assert main.run([*BASIC, "the ship", "--max-new-tokens", "200", "--json"]) == 2


@pytest.mark.usefixtures("seen")
def test_a_stop_text_ends_the_answer_and_is_left_out(opened: OpenedDecoder, capsys: pytest.CaptureFixture[str]) -> None:
    text = expected(opened, "the ship", temperature=1.0, seed=1)
    at = next(i for i in range(2, len(text)) if text[i].isascii() and text.index(text[i]) == i)
    assert run("the ship", "--temperature", "1", "--seed", "1", "--stop", "unseen", "--stop", text[at], "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["text"], document["finish_reason"]) == (text[:at], "stop")


@pytest.mark.usefixtures("seen")
def test_a_template_of_training_is_put_around_the_prompt(
    opened: OpenedDecoder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("Go.", "--template", "instruction") == 0
    assert capsys.readouterr().out == expected(opened, instruction_prompt("Go.")) + "\n"
    assert run("Go.", "--template", "chat") == 0
    assert capsys.readouterr().out == expected(opened, "### User:\nGo.\n\n### Assistant:\n") + "\n"


@pytest.mark.usefixtures("seen")
def test_figures_are_said_on_stderr_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("the ship", "--stats", "--drafter", "none") == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"{LOADING}8 prompt tokens, 12 new tokens, ")
    assert "12 round trips" in shown.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_characters_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsea.cli.answering import show

    for stream, shown in ((Terminal(), "a[31mb\n\té"), (io.StringIO(), "a\x1b[31mb\n\té\x9b")):
        monkeypatch.setattr(sys, "stdout", stream)
        show("a\x1b[31mb\n\té\x9b")
        assert stream.getvalue() == shown


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["a", "--file", "prompt.txt"], 2, "not both"),
        (["--file", "none.txt"], 3, "cannot be read"),
        (["--file", "."], 3, "cannot be read"),
        (["--file", "latin.txt"], 3, "no UTF-8"),
        (["--file", "empty.txt"], 2, "is empty"),
        ([""], 2, "is empty"),
        (["a", "--template", "poem"], 2, "choose one of text"),
        (["a", "--stop", ""], 2, "--stop is empty"),
        (["a", "--top-p", "0"], 2, "top_p must be"),
        (["a", "--temperature", "-1"], 2, "temperature"),
        (["a", "--max-new-tokens", "0"], 2, "max-new-tokens"),
        (["a", "--drafter", "none.txt"], 2, "--drafter none.txt"),
        (["a", "--device", "tpu"], 2, "cuda"),
        (["a", "--settings", "none.toml"], 2, "no file none.toml"),
    ],
)
def test_what_cannot_work_is_said_before_a_connection(
    arguments: list[str],
    code: int,
    says: str,
    seen: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"M\xfcller")
    assert main.run([*BASIC, *arguments]) == code
    shown = capsys.readouterr().err
    assert says in " ".join(shown.replace("│", " ").split())
    assert "Müller" not in shown
    assert not seen


def test_without_a_prompt_at_a_terminal_one_is_asked_for(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main.run(BASIC) == 2
    assert "Give a prompt" in capsys.readouterr().err
    assert not seen


def test_a_prompt_that_is_too_long_is_one_sentence(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("x" * 200) == 2
    error = capsys.readouterr().err
    assert "128 tokens" in error
    assert len(error.removeprefix(LOADING).splitlines()) == 1
    assert "xx" not in error
