"""Generation behind HTTP: one thread a choice, and how many may run and wait.

The event loop admits and cancels; a thread generates and hands what it has to the loop. A choice that nobody waits for
any more ends its session at once, also while its thread waits for the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect

from fedsea.client.decoding import Sequences, SplitDecoder
from fedsea.client.drafters import Drafter
from fedsea.client.gateway.errors import Closing, RequestError, unforeseen
from fedsea.client.gateway.forms import Delta, End, Token
from fedsea.client.gateway.metrics import GatewayMetrics
from fedsea.client.gateway.pieces import Pieces
from fedsea.client.gateway.requests import Choice
from fedsea.client.generation import GeneratedToken, Generation, generate
from fedsea.data.detokenize import TextStream
from fedsea.errors import CapacityError, FedseaError

Event = Delta | End | FedseaError


@dataclass(frozen=True, slots=True)
class Means:
    """What generation needs.

    Attributes:
        drafter: Drafts for every choice; None: no speculation.
    """

    decoder: SplitDecoder
    tokenizer: Any
    pieces: Pieces
    metrics: GatewayMetrics
    drafter: Drafter | None = None


class Work:
    """The choices of one request under way. Made by `Workers.start`, used on the event loop."""

    def __init__(
        self, choices: Sequence[_Running], arrived: asyncio.Queue[Event | None], give_up: Callable[[_Running], None]
    ) -> None:
        self._choices = choices
        self._arrived = arrived
        self._give_up = give_up

    async def events(self, first_s: float) -> AsyncGenerator[Event, None]:
        """What comes, until every choice has ended or one failed.

        Args:
            first_s: How long the first may take.

        Raises:
            FedseaError: A choice failed, or nothing came in time.
            ClientDisconnect: It was cancelled.
        """
        ended = 0
        try:
            event = await asyncio.wait_for(self._arrived.get(), first_s)
        except TimeoutError:
            raise CapacityError(f"There was no room for this request in {first_s:g} s; try again later.", 5.0) from None
        while True:
            if event is None:
                raise ClientDisconnect
            if isinstance(event, FedseaError):
                raise event
            yield event
            ended += isinstance(event, End)
            if ended == len(self._choices):
                return
            event = await self._arrived.get()

    def cancel(self) -> None:
        """Give up whatever has not ended; may be called twice."""
        for choice in self._choices:
            self._give_up(choice)
        self._arrived.put_nowait(None)


class Workers:
    """Threads that generate, and the line before them. Use as a context manager.

    Args:
        means: What generation needs.
        most: Choices that run at once.
        most_waiting: Choices that wait for a thread; more are refused.
    """

    def __init__(self, means: Means, most: int, most_waiting: int) -> None:
        self._means = means
        self._most = most
        self._room = most + most_waiting
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="fedsea-gateway")
        self._lock = threading.Lock()
        self._running: set[_Running] = set()
        self._waiting: dict[_Running, None] = {}  # in their order; the pool's own line keeps what is given up
        self._coming = 0
        self._closed = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            unfinished = [*self._running, *self._waiting]
            self._waiting.clear()
        for choice in unfinished:
            choice.cancel(Closing())
        self._threads.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def coming(self) -> Iterator[None]:
        """Around the reading of a request: refused at once where there is no room, so that bodies do not pile up.

        Raises:
            CapacityError: Too many choices wait already.
        """
        with self._lock:
            if self._taken() + self._coming >= self._room:
                raise _full()
            self._coming += 1
        try:
            yield
        finally:
            with self._lock:
                self._coming -= 1

    def start(self, choices: Sequence[Choice], after_prompt: bool) -> Work:
        """Take a request on; on the event loop.

        Args:
            choices: What to generate.
            after_prompt: Whether the text continues the prompt's; else it is a text of its own.

        Raises:
            RequestError: There would never be room for so many choices.
            CapacityError: Too many choices wait already.
        """
        if len(choices) > self._room:
            raise RequestError(
                f"{len(choices)} choices were asked for at once, and {self._room} is the most that this gateway takes: "
                "send several requests.",
                param="n",
            )
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(arrived.put_nowait, event)

        with self._lock:
            if self._closed:
                raise Closing()
            if self._taken() + len(choices) > self._room:
                raise _full()
            taken_on = [_Running(choice, after_prompt, deliver) for choice in choices]
            self._waiting.update(dict.fromkeys(taken_on))
            self._begin()
        return Work(taken_on, arrived, self._give_up)

    def _taken(self) -> int:
        return len(self._running) + len(self._waiting)

    def _begin(self) -> None:
        """Give free threads to those that wait. The lock is held, so that the pool is not closed meanwhile."""
        while self._waiting and len(self._running) < self._most:
            one = next(iter(self._waiting))
            del self._waiting[one]
            self._running.add(one)
            self._threads.submit(self._run, one)
        self._show()

    def _run(self, one: _Running) -> None:
        try:
            one.run(self._means)
        finally:
            with self._lock:
                self._running.discard(one)
                self._begin()

    def _give_up(self, one: _Running) -> None:
        """Cancel one; its place in the line is free at once."""
        with self._lock:
            waited = one in self._waiting
            if waited:
                del self._waiting[one]
                self._show()
        one.cancel()
        if waited:
            self._means.metrics.cancelled()

    def _show(self) -> None:
        self._means.metrics.running.set(len(self._running))
        self._means.metrics.waiting.set(len(self._waiting))


def _full() -> FedseaError:
    return CapacityError("The gateway has as many requests as it may have waiting; try again later.", 1.0)


class _Running:
    """One choice, from its place in the line to its end."""

    def __init__(self, choice: Choice, after_prompt: bool, deliver: Callable[[Event], None]) -> None:
        self._choice = choice
        self._after_prompt = after_prompt
        self._deliver = deliver
        self._lock = threading.Lock()
        self._sequences: Sequences | None = None
        self._cancelled = self._ended = False

    def cancel(self, reason: FedseaError | None = None) -> None:
        """End it, from any thread; a thread that waits for the server is woken."""
        with self._lock:
            if self._ended or self._cancelled:
                return
            self._cancelled = True
            if self._sequences is not None:
                self._sequences.session.close()
        if reason is not None:
            self._deliver(reason)

    def run(self, means: Means) -> None:
        """Generate; on a thread of the pool."""
        try:
            with self._opened(means.decoder) as sequences:
                if sequences is not None:
                    self._generate(means, sequences)
        except FedseaError as error:
            if not self._cancelled:
                self._deliver(error)
        except Exception as error:  # noqa: BLE001 (the last resort: whoever waits must hear of it)
            self._deliver(unforeseen(error))
        if self._cancelled:
            means.metrics.cancelled()

    @contextlib.contextmanager
    def _opened(self, decoder: SplitDecoder) -> Iterator[Sequences | None]:
        """A sequence that `cancel` knows of; None if it was cancelled before."""
        length = len(self._choice.prompt) + self._choice.settings.max_new_tokens
        sequences: Sequences | None = None
        try:
            sequences = None if self._cancelled else decoder.open(length)
            with self._lock:
                self._sequences = sequences
                wanted = not self._cancelled
            yield sequences if wanted else None
        finally:
            with self._lock:
                self._ended = True
            if sequences is not None:
                sequences.close()

    def _generate(self, means: Means, sequences: Sequences) -> None:
        choice = self._choice
        after = choice.prompt if self._after_prompt else ()
        change = choice.restore() if choice.restore else None
        text = TextStream(means.tokenizer, choice.stop, after=after, change=change)
        held: list[Token] = []
        with generate(
            means.decoder, choice.prompt, choice.settings, drafter=means.drafter, sequences=sequences
        ) as generation:
            for token in generation:
                if self._cancelled:
                    return
                if token.logprob is not None:
                    held.append(_entry(means.pieces, token, text.length))
                if new := text.push(token.id):
                    self._deliver(Delta(choice.index, new, _behind(held, text.length) if text.stopped else _all(held)))
                if text.stopped:
                    break
            rest = text.finish()
            if rest or (held and not text.stopped):
                self._deliver(Delta(choice.index, rest, _behind(held, text.length) if text.stopped else _all(held)))
            self._end(means, generation, text.stopped)

    def _end(self, means: Means, generation: Generation, stopped: bool) -> None:
        stats = generation.stats
        means.metrics.generated(stats)
        with self._lock:
            self._ended = True
        reason = "stop" if stopped else generation.finish_reason or "length"
        self._deliver(End(self._choice.index, reason, len(self._choice.prompt), stats.new_tokens))


def _entry(pieces: Pieces, token: GeneratedToken, offset: int) -> Token:
    top = tuple((pieces.text(other), pieces.bytes(other), logprob) for other, logprob in token.top)
    assert token.logprob is not None
    return Token(pieces.text(token.id), pieces.bytes(token.id), token.logprob, offset, top)


def _all(held: list[Token]) -> tuple[Token, ...]:
    taken = tuple(held)
    held.clear()
    return taken


def _behind(held: list[Token], length: int) -> tuple[Token, ...]:
    """The tokens that the last text before a stop string comes from; it ends after so many letters."""
    return tuple(token for token in held if token.offset < length)
