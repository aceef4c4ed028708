"""What `fedsea generate` and `fedsea chat` share: options of generation, and one answer as it comes."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedsea.client.answer import GenerationSettings, GenerationStats
    from fedsea.client.decoding import Sequences
    from fedsea.client.drafters import Drafter
    from fedsea.client.inference import OpenedDecoder
    from fedsea.client.options import ClientOptions
    from fedsea.client.pseudonyms import Prompt

Run = Annotated[Path, typer.Option(help="Run folder of `fedsea train` with this server.")]
Base = Annotated[
    bool, typer.Option("--base", help="The base model's own segments with the server's trunk; needs no run folder.")
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time; higher varies more.")]
TopK = Annotated[int, typer.Option(metavar="N", min=0, help="Sample among the N likeliest tokens; 0: among all.")]
TopP = Annotated[float, typer.Option(metavar="P", help="Sample among the likeliest tokens that have this share.")]
MinP = Annotated[float, typer.Option(metavar="P", help="Leave out tokens below this share of the likeliest one's.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens that were there become less likely.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Sample the same answer each time.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text that ends an answer; may be repeated.")]
DrafterName = Annotated[
    str,
    typer.Option(
        "--drafter",
        metavar="NAME",
        help="What guesses tokens ahead, which saves round trips and changes no answer: none, prompt-lookup, "
        "early-exit, or the folder of a small model with the same tokenizer.",
    ),
]

_NO_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def generation_settings(*, stop: Sequence[str] | None, **chosen: Any) -> GenerationSettings:
    """The options as the Python call takes them, checked before torch is loaded.

    Raises:
        ConfigError: One of them makes no sense.
    """
    from fedsea.client.answer import GenerationSettings
    from fedsea.errors import ConfigError

    if not all(stop or ()):
        raise ConfigError("--stop is empty and would end every answer before it begins: leave it out.")
    return GenerationSettings(**chosen)


@contextlib.contextmanager
def open_model(options: ClientOptions, *, base: bool, silent: bool = False) -> Iterator[OpenedDecoder]:
    """`client.inference.open_decoder`, which takes seconds: what is done meanwhile is shown, unless `silent`."""
    from fedsea.cli.loading import LIBRARIES, Loading

    with Loading(silent) as loading:
        loading(LIBRARIES)
        from fedsea.client.inference import open_decoder

        with open_decoder(options, base=base, tell=loading) as opened:
            loading.done()
            yield opened


def pick_drafter(name: str, opened: OpenedDecoder) -> Drafter | None:
    """The drafter that `--drafter` names; None: none.

    Raises:
        ConfigError: There is no model of that name, or it does not fit.
    """
    from fedsea.client import drafters

    if name == "none":
        return None
    if name == "prompt-lookup":
        return drafters.PromptLookup()
    if name == "early-exit":
        return drafters.EarlyExit(opened.decoder)
    return drafters.ModelDrafter(name, tokenizer=opened.tokenizer, device=opened.decoder.segments.device)


def check_drafter(name: str) -> None:
    """Before a connection: whether `--drafter` names something.

    Raises:
        ConfigError: It does not.
    """
    from fedsea.errors import ConfigError

    if name not in ("none", "prompt-lookup", "early-exit") and not Path(name).is_dir():
        raise ConfigError(
            f"--drafter {name} is no folder: give none, prompt-lookup, early-exit, or the folder of a small model."
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is over.

    Attributes:
        finish_reason: "stop", "length", or "interrupted".
        bytes_sent: By this process to the server, while it was made.
        bytes_received: Likewise from it.
    """

    text: str
    finish_reason: str
    stats: GenerationStats
    bytes_sent: int
    bytes_received: int


def answer(
    opened: OpenedDecoder,
    prompt: Prompt,
    settings: GenerationSettings,
    show: Callable[[str], None],
    *,
    drafter: Drafter | None = None,
    sequences: Sequences | None = None,
    stop: Sequence[str] = (),
    continues: bool = False,
    ended: Callable[[], bool] = lambda: False,
) -> Answer:
    """Make an answer and show it as it comes.

    Args:
        opened: The model.
        prompt: What the model is given; originals of its pseudonyms are put back into the answer.
        settings: How to choose tokens.
        show: Takes text, piece by piece.
        drafter: Guesses tokens ahead.
        sequences: See `client.generation.generate`.
        stop: Texts that end the answer; they are not part of it.
        continues: The answer goes on where the prompt ends, so a space at its beginning counts.
        ended: Asked after every token; True ends the answer there.
    """
    from fedsea.client.generation import generate
    from fedsea.data.detokenize import TextStream

    change = prompt.restore() if prompt.restore else None
    stream = TextStream(opened.tokenizer, stop, after=prompt.ids if continues else (), change=change)
    pieces: list[str] = []

    def take(piece: str) -> None:
        if piece:
            pieces.append(piece)
            show(piece)

    sent, received = num_bytes(opened)
    reason = ""
    with generate(opened.decoder, prompt.ids, settings, drafter=drafter, sequences=sequences) as generation:
        for token in generation:
            take(stream.push(token.id))
            if stream.stopped or ended():
                reason = "stop" if stream.stopped else "interrupted"
                break
        take(stream.finish())
        reason = "stop" if stream.stopped else reason or generation.finish_reason or "length"
    sent_after, received_after = num_bytes(opened)
    return Answer("".join(pieces), reason, generation.stats, sent_after - sent, received_after - received)


def num_bytes(opened: OpenedDecoder) -> tuple[int, int]:
    """Bytes sent to the server and received from it so far; there are none without one."""
    from fedsea.client.remote_trunk import RemoteTrunk

    return opened.trunk.num_bytes if isinstance(opened.trunk, RemoteTrunk) else (0, 0)


def show(piece: str) -> None:
    """Write a piece of an answer to stdout at once; a terminal gets no control characters that a model made up."""
    if sys.stdout.isatty():
        piece = piece.translate(_NO_CONTROLS)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def figures(stats: Sequence[GenerationStats], sent: int, received: int) -> str:
    """One line about one or several answers: tokens, speed, round trips, accepted drafts, bytes."""
    from fedsea.observe.figures import bytes_text, counted, number_text

    new = sum(one.new_tokens for one in stats)
    seconds = math.fsum(one.seconds for one in stats)
    first_s = math.fsum(one.first_token_s for one in stats) / len(stats)
    drafted = sum(one.drafted for one in stats)
    parts = [
        f"{counted(sum(one.prompt_tokens for one in stats), 'prompt token')}, {counted(new, 'new token')}",
        f"{number_text(new / seconds) if seconds > 0 else '0'} tokens/s",
        f"first after {first_s:.2f} s{' on average' if len(stats) > 1 else ''}",
        counted(sum(one.round_trips for one in stats), "round trip"),
    ]
    if drafted:
        parts.append(f"{sum(one.accepted for one in stats) / drafted:.0%} of {counted(drafted, 'draft')} accepted")
    return ", ".join([*parts, f"sent {bytes_text(sent)}, received {bytes_text(received)}"])
