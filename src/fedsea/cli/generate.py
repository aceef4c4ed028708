"""`fedsea generate`: one answer of the federation's model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from fedsea.cli import answering as a
from fedsea.cli import options as o
from fedsea.cli import output

if TYPE_CHECKING:
    from fedsea.cli.answering import Answer
    from fedsea.client.answer import GenerationSettings
    from fedsea.client.options import ClientOptions

_TEMPLATES = ("text", "instruction", "chat")
_NEW_TOKENS = 256
_MOST_PROMPT_BYTES = 16 << 20


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The text to go on from; `-` or none reads standard input, whose last line break does not count.",
            show_default=False,
        ),
    ] = None,
    server: o.Server = None,
    identity: o.Identity = Path("identity"),
    run: a.Run = Path("runs/client"),
    base: a.Base = False,
    model: o.Model = None,
    settings: o.Settings = None,
    file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Read the prompt here; its last line break does not count.")
    ] = None,
    template: Annotated[
        str,
        typer.Option(metavar="NAME", help="What training put around it: text (nothing), instruction or chat."),
    ] = "text",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help=f"Longest answer, in tokens; {_NEW_TOKENS}, or what fits, if not given."),
    ] = None,
    temperature: a.Temperature = 0.0,
    top_k: a.TopK = 0,
    top_p: a.TopP = 1.0,
    min_p: a.MinP = 0.0,
    repetition_penalty: a.RepetitionPenalty = 1.0,
    seed: a.Seed = None,
    stop: a.Stop = None,
    drafter: a.DrafterName = "prompt-lookup",
    stats: Annotated[bool, typer.Option("--stats", help="Say afterwards, on stderr, how fast it was.")] = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    retry_for: o.RetryFor = 60.0,
    as_json: o.Json = False,
) -> None:
    """Let the federation's model go on from a text; the answer goes to stdout as it comes.

    Needs the run folder of `fedsea train`, the base model, and the server, which runs the trunk. Prompt and answer stay
    on this machine, but the server can reconstruct them from what it receives, as in training.

    Example: `fedsea generate --server fedsea.example.org:7443 --run runs/clinic "The patient was"`

    A question: `fedsea generate --server fedsea.example.org:7443 --template instruction --file question.txt --json`
    """
    output.begin(as_json=as_json, quiet=True)
    text = _read(prompt, file)
    if template not in _TEMPLATES:
        raise typer.BadParameter(f"choose one of {', '.join(_TEMPLATES)}", param_hint="--template")
    a.check_drafter(drafter)
    wanted = a.generation_settings(
        max_new_tokens=max_new_tokens or _NEW_TOKENS,
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
    found = _generate(
        options,
        text,
        template,
        wanted,
        fit=max_new_tokens is None,
        drafter=drafter,
        stop=stop or (),
        base=base,
        silent=as_json,
    )
    if as_json:
        output.result(_document(found))
        return
    output.say("")
    if stats:
        output.tell(a.figures([found.stats], found.bytes_sent, found.bytes_received))


def _generate(
    options: ClientOptions,
    text: str,
    template: str,
    wanted: GenerationSettings,
    *,
    fit: bool,
    drafter: str,
    stop: Sequence[str],
    base: bool,
    silent: bool,
) -> Answer:
    from dataclasses import replace

    with a.open_model(options, base=base, silent=silent) as opened:
        prompts = opened.prompts
        if template == "chat":
            prompt = prompts.chat([{"role": "user", "content": text}])
        else:
            prompt = prompts.instruction(text) if template == "instruction" else prompts.text(text)
        room = max(1, opened.decoder.max_tokens - len(prompt.ids)) if fit else wanted.max_new_tokens
        wanted = replace(wanted, max_new_tokens=min(room, wanted.max_new_tokens), stop_tokens=opened.stop_tokens)
        return a.answer(
            opened,
            prompt,
            wanted,
            (lambda _: None) if silent else a.show,
            drafter=a.pick_drafter(drafter, opened),
            stop=stop,
            continues=template == "text",
        )


def _document(found: Answer) -> dict[str, Any]:
    stats = found.stats
    return {
        "text": found.text,
        "finish_reason": found.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "stats": {
            "round_trips": stats.round_trips,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "first_token_s": round(stats.first_token_s, 6),
            "seconds": round(stats.seconds, 6),
            "tokens_per_s": round(stats.tokens_per_s, 3),
            "bytes_sent": found.bytes_sent,
            "bytes_received": found.bytes_received,
        },
    }


def _read(prompt: str | None, file: Path | None) -> str:
    """The prompt: the argument, a file, or standard input.

    Raises:
        ConfigError: There is none, or more than one.
        DataError: It cannot be read.
    """
    from fedsea.errors import ConfigError, DataError

    if prompt is not None and file is not None:
        raise ConfigError("Give a prompt or --file, not both.")
    if prompt is None and file is None and sys.stdin.isatty():
        raise ConfigError('Give a prompt: fedsea generate … "The patient was", or --file, or pipe it in.')
    where = "The prompt" if file is None else str(file)
    try:
        if prompt is not None and prompt != "-":
            text = prompt.encode(errors="surrogateescape").decode()
        else:
            text = _whole(sys.stdin.buffer if file is None else file).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise DataError(f"{where} is no UTF-8 text: convert it, for example with iconv.") from None
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror}): check the path after --file.") from None
    if not text.strip():
        raise ConfigError(f"{where} is empty: a prompt needs text.")
    return text


def _whole(source: Path | BinaryIO) -> str:
    from fedsea.errors import DataError

    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as stream:
        data = stream.read(_MOST_PROMPT_BYTES + 1)
    if len(data) > _MOST_PROMPT_BYTES:
        raise DataError(f"A prompt may have {_MOST_PROMPT_BYTES >> 20} MB: no model reads more at once.")
    return data.decode("utf-8-sig")
