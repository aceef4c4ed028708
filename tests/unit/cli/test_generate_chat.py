"""`fedsea chat`: turns, commands, caches that stay, and Ctrl-C."""

from __future__ import annotations

import builtins
import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.cli import answering, main
from fedsea.cli.conversation import Conversation
from fedsea.client import inference
from fedsea.client.decoding import Sequences
from fedsea.client.generation import GenerationSettings, generate
from fedsea.client.inference import OpenedDecoder
from fedsea.client.local_trunk import LocalTrunk
from fedsea.errors import CapacityError, ConfigError, FedseaError, SessionLost, SessionTooLarge, TransportError
from tests.support.opened import open_local, pages

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
CHAT = ["chat", "--server", "h:1", "--max-new-tokens", "6", "--temperature", "1", "--seed", "5"]
pytestmark = pytest.mark.usefixtures("without_folders")


@pytest.fixture(scope="module")
def opened(base_model: Path) -> OpenedDecoder:
    return open_local(base_model, TEMPLATE)


@pytest.fixture
def talk(opened: OpenedDecoder, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says lines to `fedsea chat`, and gives its exit code."""

    @contextlib.contextmanager
    def local(options: Any, *, base: bool = False, tell: Any) -> Iterator[OpenedDecoder]:
        yield opened

    monkeypatch.setattr(inference, "open_decoder", local)

    def say(*lines: str, options: tuple[str, ...] = ()) -> int:
        text = "".join(line + "\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode(errors="surrogateescape"))))
        return main.run([*CHAT, *options])

    return say


def settings(opened: OpenedDecoder, most: int = 6) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=most, temperature=1.0, seed=5, stop_tokens=opened.stop_tokens)


def alone(opened: OpenedDecoder, rendered: str) -> str:
    """The answer to a conversation that is computed from its beginning."""
    ids = opened.tokenizer.encode(rendered, add_special_tokens=False)
    with generate(opened.decoder, ids, settings(opened)) as generation:
        return opened.tokenizer.decode([token.id for token in generation], skip_special_tokens=True)


def test_each_turn_is_answered_with_all_that_was_said(
    opened: OpenedDecoder, talk: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk("hi", "", "and", "/reset", "hi", options=("--system", "be")) == 0
    first = alone(opened, "<s>be<u>hi<a>")
    second = alone(opened, f"<s>be<u>hi<a>{first}<u>and<a>")
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"
    assert pages(opened) == [0, 0, 0]


def test_what_was_said_before_is_not_computed_again(opened: OpenedDecoder) -> None:
    with contextlib.closing(Conversation(opened, settings(opened))) as conversation:
        first, second = conversation.say("hi"), conversation.say("and")
    assert first.stats.cached_tokens == 0
    assert second.stats.cached_tokens >= first.stats.prompt_tokens


def test_caches_grow_with_the_conversation(opened: OpenedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.cli.conversation._LEAST_TOKENS", 16)
    with contextlib.closing(Conversation(opened, settings(opened))) as conversation:
        answers = [conversation.say(text) for text in ("hi", "and", "so")]
    rendered = ""
    for said, found in zip(("hi", "and", "so"), answers, strict=True):
        rendered += f"<u>{said}<a>"
        assert found.text == alone(opened, rendered)
        rendered += found.text


def test_a_conversation_that_is_full_says_so_and_goes_on_after_a_reset(
    opened: OpenedDecoder, talk: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk("x" * 130, "hi", "y" * 110, "/reset", "hi") == 0
    shown, hi = capsys.readouterr(), alone(opened, "<u>hi<a>")
    assert shown.out == f"{hi}\n{hi}\n"
    assert shown.err.count("/reset begins a new one") == 2
    assert "xx" not in shown.err
    assert "yy" not in shown.err


def test_an_answer_is_cut_to_the_room_that_is_left(opened: OpenedDecoder) -> None:
    with contextlib.closing(Conversation(opened, settings(opened, most=100))) as conversation:
        found = conversation.say("x" * 100)
    assert found.stats.prompt_tokens + found.stats.new_tokens <= opened.decoder.max_tokens


def test_stats_are_of_the_last_answer_and_of_all(talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk("/stats", "hi", "and", "/stats", "/quit", "never said", options=("--drafter", "none")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "There is no answer yet."
    last, every = (line for line in lines if "round trips" in line)
    assert last.startswith("last answer: ")
    assert "6 new tokens" in last
    assert every.startswith("all 2 answers: ")
    assert "12 new tokens" in every
    assert "12 round trips" in every
    assert " on average" in every
    assert " on average" not in last


def test_a_conversation_that_begins_anew_has_figures_of_its_own(talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk("hi", "and", "/reset", "/stats", "so", "/stats") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("(Cut off", "Loading"))]
    assert said[:2] == ["The conversation begins anew.", "There is no answer yet."]
    assert [line.split(":")[0] for line in said[2:]] == ["last answer"]


def test_an_unknown_command_is_no_turn(talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk("/quitt") == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "/quit ends" in shown.err


def interrupt_at(monkeypatch: pytest.MonkeyPatch, calls: tuple[int, ...]) -> None:
    """Ctrl-C while the trunk works, at these messages of the process."""
    original, count = Sequences.extend, 0

    def extend(self: Sequences, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        for _ in range(calls.count(count)):
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Sequences, "extend", extend)


def test_ctrl_c_ends_the_answer_and_not_the_program(
    opened: OpenedDecoder, talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = alone(opened, "<u>hi<a>")
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, (3,))
    assert talk("hi", "/reset", "hi", options=("--drafter", "none")) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{whole[:3]}\n{whole}\n"
    assert "(Interrupted.)" in shown.err
    assert signal.getsignal(signal.SIGINT) is before


def test_what_came_before_ctrl_c_is_part_of_the_conversation(
    opened: OpenedDecoder, talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = alone(opened, "<u>hi<a>")[:3]
    second = alone(opened, f"<u>hi<a>{begun}<u>and<a>")
    interrupt_at(monkeypatch, (3,))
    assert talk("hi", "and", options=("--drafter", "none")) == 0
    assert capsys.readouterr().out == f"{begun}\n{second}\n"


def test_a_second_ctrl_c_does_not_wait_for_the_server_and_forgets_the_turn(
    opened: OpenedDecoder, talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = alone(opened, "<u>hi<a>")
    interrupt_at(monkeypatch, (3, 3))
    assert talk("hi", "hi", options=("--drafter", "none")) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].endswith(whole)
    assert "the last turn is forgotten" in shown.err
    assert pages(opened) == [0, 0, 0]


def test_ctrl_c_at_the_prompt_ends_nothing_and_ctrl_d_does(
    talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([KeyboardInterrupt, "hi", EOFError])

    def read(_: str) -> str:
        got = next(typed)
        if isinstance(got, str):
            return got
        raise got

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr("io.TextIOWrapper", lambda _: Terminal())
    assert talk() == 0
    shown = capsys.readouterr()
    assert "/quit or Ctrl-D ends" in shown.err
    assert len(shown.out.splitlines()) == 1


def test_a_full_server_ends_the_turn_and_a_lost_one_the_program(
    opened: OpenedDecoder, talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = alone(opened, "<u>hi<a>")
    errors = iter([CapacityError("The server's memory is full."), None, TransportError("The server is lost.")])
    original = answering.answer

    def answer(*args: Any, **kwargs: Any) -> Any:
        if (error := next(errors)) is not None:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(answering, "answer", answer)
    assert talk("first", "hi", "third", "never said") == TransportError.exit_code
    shown = capsys.readouterr()
    assert shown.out == f"{whole}\n"
    told = [line for line in shown.err.splitlines() if line.startswith("Error")]
    assert told == ["Error: The server's memory is full.", "Error: The server is lost."]
    assert pages(opened) == [0, 0, 0]


@pytest.fixture
def small_server(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The server never has room for more than 40 tokens; the lengths of sessions that it was asked for."""
    asked, original = [], LocalTrunk.open_session

    def open_session(self: LocalTrunk, max_tokens: int, num_sequences: int = 1) -> Any:
        session = original(self, max_tokens, num_sequences)
        asked.append(max_tokens)
        if max_tokens > 40:
            refused = Future[torch.Tensor]()
            refused.set_exception(SessionTooLarge("There is no room for this."))
            session.extend = lambda *_: refused  # type: ignore[method-assign]
        return session

    monkeypatch.setattr(LocalTrunk, "open_session", open_session)
    return asked


def test_where_there_is_no_room_to_spare_a_turn_takes_what_it_needs(
    opened: OpenedDecoder, small_server: list[int]
) -> None:
    with contextlib.closing(Conversation(opened, settings(opened))) as conversation:
        first = conversation.say("hi")
        second = conversation.say("and")
    assert second.text == alone(opened, f"<u>hi<a>{first.text}<u>and<a>")
    needed = [found.stats.prompt_tokens + 6 for found in (first, second)]
    assert small_server[:3] == [opened.decoder.max_tokens, *needed], "and no more is asked for again"
    assert pages(opened) == [0, 0, 0]


def test_a_turn_for_which_the_server_has_no_room_is_told_and_the_conversation_goes_on(
    opened: OpenedDecoder, talk: Any, small_server: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk("x" * 60, "hi") == 0
    shown = capsys.readouterr()
    assert shown.err.count("Error: There is no room for this.") == 1
    assert shown.out == f"{alone(opened, '<u>hi<a>')}\n"


def test_a_turn_whose_session_is_lost_before_its_answer_begins_is_computed_again(
    opened: OpenedDecoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(Conversation(opened, settings(opened))) as conversation:
        first = conversation.say("hi")
        assert conversation._sequences is not None
        session, lost = conversation._sequences.session, Future[torch.Tensor]()
        lost.set_exception(SessionLost("The adapters have changed."))
        monkeypatch.setattr(session, "extend", lambda *_: lost)
        second = conversation.say("and")
    assert second.text == alone(opened, f"<u>hi<a>{first.text}<u>and<a>")
    assert second.stats.cached_tokens == 0
    assert capsys.readouterr().out == first.text + second.text


def test_a_session_lost_in_the_middle_of_an_answer_is_told_and_the_conversation_stays(
    opened: OpenedDecoder, talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns, original = iter(["hi", "lost", "and"]), answering.answer

    def answer(*args: Any, **kwargs: Any) -> Any:
        if next(turns) == "lost":
            args[3]("par")
            raise SessionLost("The adapters have changed.")
        return original(*args, **kwargs)

    monkeypatch.setattr(answering, "answer", answer)
    assert talk("hi", "lost", "and") == 0
    first, shown = alone(opened, "<u>hi<a>"), capsys.readouterr()
    assert shown.out == f"{first}\npar\n{alone(opened, f'<u>hi<a>{first}<u>and<a>')}\n"
    assert "Error: The adapters have changed. The conversation stays as it was before this turn." in shown.err


@pytest.mark.parametrize("error", [SessionLost("Lost."), SessionTooLarge("There is no room for this.")])
@pytest.mark.parametrize("begun", [True, False], ids=["shown", "interrupted"])
def test_an_answer_that_is_shown_or_not_wanted_any_more_is_not_begun_again(
    opened: OpenedDecoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: FedseaError,
    begun: bool,
) -> None:
    tries = []

    def answer(*args: Any, **_: Any) -> Any:
        tries.append(args)
        if begun:
            args[3]("par")
        else:
            signal.raise_signal(signal.SIGINT)
        raise error

    monkeypatch.setattr(answering, "answer", answer)
    with contextlib.closing(Conversation(opened, settings(opened))) as conversation:
        with pytest.raises(type(error)):
            conversation.say("hi")
        assert conversation._messages == []
    assert len(tries) == 1
    assert capsys.readouterr().out == ("par" if begun else "")
    assert pages(opened) == [0, 0, 0]


def test_a_session_that_is_lost_again_and_again_before_its_answer_begins_is_told(
    opened: OpenedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def answer(*args: Any, **_: Any) -> Any:
        tries.append(args)
        raise SessionLost("Lost.")

    monkeypatch.setattr(answering, "answer", answer)
    with contextlib.closing(Conversation(opened, settings(opened))) as conversation, pytest.raises(SessionLost):
        conversation.say("hi")
    assert len(tries) == 2


def test_a_line_that_is_no_text_is_one_sentence(talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk("M\udcfcller") == 3
    shown = capsys.readouterr()
    assert "no UTF-8" in shown.err
    assert "ller" not in shown.err


def test_a_template_that_refuses_the_conversation_is_one_sentence(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = open_local(base_model, "{{ raise_exception('no system') }}")
    conversation = Conversation(refusing, settings(refusing))
    with pytest.raises(ConfigError, match="chat template"):
        conversation.say("hi")
