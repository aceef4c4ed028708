"""The conversation behind `fedsea chat`: what was said, and the caches that remember it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FrameType

from fedsea.cli import answering as a
from fedsea.cli.answering import Answer
from fedsea.client.decoding import Sequences
from fedsea.client.generation import GenerationSettings
from fedsea.client.inference import OpenedDecoder
from fedsea.client.pseudonyms import Prompt
from fedsea.errors import ConfigError, SessionLost, SessionTooLarge

_LEAST_TOKENS = 1024
"""Memory is set aside for so many at least, and for twice as many as are needed whenever it has to be more.

Where the server can never have so much, it is set aside for as many as are needed.
"""


class Conversation:
    """Turns with one model; the caches of what was said stay, here and at the server.

    Args:
        opened: The model.
        settings: How to choose tokens.
        drafter: See `answering.pick_drafter`.
        stop: Texts that end an answer.
        system: How the model is to behave, or None.
    """

    def __init__(
        self,
        opened: OpenedDecoder,
        settings: GenerationSettings,
        drafter: str = "none",
        stop: Sequence[str] = (),
        system: str | None = None,
    ) -> None:
        self._opened = opened
        self._settings = settings
        self._drafter = a.pick_drafter(drafter, opened)
        self._stop = stop
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._first)
        self._prompts = opened.prompts
        self._sequences: Sequences | None = None
        self._too_many = opened.decoder.max_tokens + 1  # tokens; the server has no room for so many, now or later
        self.answers: list[Answer] = []

    def say(self, text: str) -> Answer:
        """One turn: what the user says, and the model's answer, which is shown as it comes.

        Where the server no longer has what was said before, as after a round of training, or never has so much room
        as was asked for, it is computed again, as long as nothing is shown: nobody sees two beginnings of an answer.
        Ctrl-C ends the answer after the token under way; a second one at once, where the server does not answer.

        Raises:
            SessionLost: It was lost when a part of it was shown already: ask again.
            FedseaError: There is no answer; the conversation is as it was before.
        """
        asked = [*self._messages, {"role": "user", "content": text}]
        prompt = self._prompts.chat(asked)
        with _interruptible() as interrupted:
            found = self._answer(prompt, interrupted)
        self._messages = [*asked, {"role": "assistant", "content": found.text}]
        self.answers.append(found)
        return found

    def _answer(self, prompt: Prompt, interrupted: threading.Event) -> Answer:
        """The answer, tried once more after a loss, and once more in as much room as it needs and no spare."""
        settings, needed = self._fitting(len(prompt.ids)), self._needed(len(prompt.ids))
        shown, lost = threading.Event(), False
        while True:
            sequences = self._room(needed)
            try:
                return self._answer_in(sequences, prompt, settings, shown, interrupted)
            except SessionLost:
                if lost or shown.is_set() or interrupted.is_set():
                    raise
                lost = True
            except SessionTooLarge:
                if sequences.max_tokens == needed or shown.is_set() or interrupted.is_set():
                    raise
                self._too_many = sequences.max_tokens

    def _answer_in(
        self,
        sequences: Sequences,
        prompt: Prompt,
        settings: GenerationSettings,
        shown: threading.Event,
        interrupted: threading.Event,
    ) -> Answer:
        """One try; `shown` is set when something of it is on the screen."""

        def show(piece: str) -> None:
            shown.set()
            a.show(piece)

        try:
            return a.answer(
                self._opened,
                prompt,
                settings,
                show,
                drafter=self._drafter,
                sequences=sequences,
                stop=self._stop,
                ended=interrupted.is_set,
            )
        except BaseException:  # also a second Ctrl-C: a message under way leaves the caches out of step
            self.close()
            raise

    def reset(self) -> None:
        """Forget what was said, and the figures of its answers."""
        self._messages = list(self._first)
        self.answers = []
        self.close()

    def close(self) -> None:
        """Give the caches back; the next turn computes what it needs again."""
        if self._sequences is not None:
            self._sequences.close()
            self._sequences = None

    def _fitting(self, num_prompt: int) -> GenerationSettings:
        """The settings with as long an answer as there is room for.

        Raises:
            ConfigError: There is none.
        """
        left = self._opened.decoder.max_tokens - num_prompt
        if left < 1:
            raise ConfigError(
                f"The conversation has grown to {num_prompt} tokens, and {self._opened.decoder.max_tokens} is the most "
                "here, answer included: /reset begins a new one."
            )
        return replace(self._settings, max_new_tokens=min(self._settings.max_new_tokens, left))

    def _needed(self, num_prompt: int) -> int:
        """Tokens that a turn may take, its answer and all before it."""
        return min(num_prompt + self._settings.max_new_tokens, self._opened.decoder.max_tokens)

    def _room(self, needed: int) -> Sequences:
        """The sequence to go on with; a larger one where so many tokens might not fit."""
        decoder = self._opened.decoder
        if self._sequences is None or self._sequences.max_tokens < needed:
            self.close()
            ample = min(max(_LEAST_TOKENS, 2 * needed), decoder.max_tokens)
            self._sequences = decoder.open(ample if ample < self._too_many else needed)
        return self._sequences


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; once it is set, the next one raises `KeyboardInterrupt`."""
    asked = threading.Event()

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
