"""`fedsea chat`: a conversation with the federation's model."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import answering as a
from fedsea.cli import options as o
from fedsea.cli import output

if TYPE_CHECKING:
    from fedsea.cli.conversation import Conversation

_HELP = "/reset forgets the conversation, /stats says how fast it was, /quit ends. Ctrl-C ends an answer."


def chat(
    server: o.Server = None,
    identity: o.Identity = Path("identity"),
    run: a.Run = Path("runs/client"),
    base: a.Base = False,
    model: o.Model = None,
    settings: o.Settings = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="How the model is to behave.")] = None,
    max_new_tokens: a.MaxNewTokens = 512,
    temperature: a.Temperature = 0.0,
    top_k: a.TopK = 0,
    top_p: a.TopP = 1.0,
    min_p: a.MinP = 0.0,
    repetition_penalty: a.RepetitionPenalty = 1.0,
    seed: a.Seed = None,
    stop: a.Stop = None,
    drafter: a.DrafterName = "prompt-lookup",
    threads: o.Threads = None,
    device: o.Device = "cpu",
    retry_for: o.RetryFor = 60.0,
) -> None:
    """Talk with the federation's model; every line is a turn, and what was said before is not computed again.

    `/reset` forgets the conversation, `/stats` says how fast it was, `/quit` or Ctrl-D ends. Ctrl-C ends an answer.
    The tokenizer's chat template is used, or the plain one of training. The conversation is written nowhere, but the
    server can reconstruct it from what it receives, as in training.

    Example: `fedsea chat --server fedsea.example.org:7443 --run runs/clinic --temperature 0.7`
    """
    output.begin(quiet=True)
    a.check_drafter(drafter)
    wanted = a.generation_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    address = o.need_server(server)
    if not base:
        o.need_run(run)
    options = o.client_options(
        address,
        identity,
        run=run,
        model=model,
        settings=settings,
        threads=threads,
        device=device,
        retry_for=retry_for,
    )
    with a.open_model(options, base=base) as opened:
        from fedsea.cli.conversation import Conversation

        wanted = replace(wanted, stop_tokens=opened.stop_tokens)
        with contextlib.closing(Conversation(opened, wanted, drafter, stop or (), system)) as conversation:
            _talk(conversation)


def _talk(conversation: Conversation) -> None:
    """Read lines and answer them until there are no more."""
    from fedsea.errors import CapacityError, ConfigError, SessionLost

    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives `input` its line editing)
        output.tell(_HELP)
    while (line := _read(on_terminal)) is not None:
        match line.strip():
            case "":
                continue
            case "/quit":
                return
            case "/reset":
                conversation.reset()
                output.tell("The conversation begins anew.")
            case "/stats":
                _stats(conversation)
            case command if command.startswith("/"):
                output.tell(f"There is no such command. {_HELP}")
            case text:
                try:
                    _turn(conversation, text)
                except SessionLost as error:  # the conversation can go on, here and below
                    output.say("")
                    output.failure(error.code, f"{error.message} The conversation stays as it was before this turn.")
                except (CapacityError, ConfigError) as error:
                    output.failure(error.code, error.message)


def _turn(conversation: Conversation, text: str) -> None:
    try:
        found = conversation.say(text)
    except KeyboardInterrupt:
        output.tell("\nInterrupted; the last turn is forgotten.")
        return
    output.say("")
    if found.finish_reason == "length":
        output.tell(f"(Cut off after {found.stats.new_tokens} tokens: see --max-new-tokens.)")
    elif found.finish_reason == "interrupted":
        output.tell("(Interrupted.)")


def _read(on_terminal: bool) -> str | None:
    """The next line; None: there is none, or the user is leaving."""
    from fedsea.errors import DataError

    while True:
        try:
            if on_terminal:
                return input("> ")
            line = sys.stdin.readline()
            line.encode()
            return line or None
        except EOFError:
            output.tell("")
            return None
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            output.tell("\n(/quit or Ctrl-D ends.)")
        except UnicodeError:
            raise DataError("A line is no UTF-8 text: convert it, for example with iconv.") from None


def _stats(conversation: Conversation) -> None:
    answers = conversation.answers
    if not answers:
        output.tell("There is no answer yet.")
        return
    parts = [("last answer", answers[-1:]), (f"all {len(answers)} answers", answers)]
    for name, some in parts[: len(answers)]:
        sent, received = sum(one.bytes_sent for one in some), sum(one.bytes_received for one in some)
        output.tell(f"{name}: {a.figures([one.stats for one in some], sent, received)}")
