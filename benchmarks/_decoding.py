"""Who decodes, told what by orders: a client of fedsea, and transformers' `generate` with the whole model.

Both answer every order. Prompts are token ids; answers are greedy and of a fixed length.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# --- split ------------------------------------------------------------------------------------------------------------


class Split:
    """A client of fedsea.

    Args:
        opened: Of `fedsea.client.inference.open_decoder`.
    """

    def __init__(self, opened: Any) -> None:
        self._decoder = opened.decoder
        self._trunk = opened.trunk
        self._tokenizer = opened.tokenizer
        self._load: list[Any] = []

    def encode(self, text: str) -> dict[str, Any]:
        """Token ids of a text."""
        return {"ids": self._tokenizer(text, add_special_tokens=True)["input_ids"]}

    def generate(self, prompt: list[int], new_tokens: int, drafter: str | None = None) -> dict[str, Any]:
        """An answer with caches on both sides, with drafts if so asked."""
        from fedsea.client.drafters import EarlyExit, PromptLookup
        from fedsea.client.generation import GenerationSettings, generate

        drafters: dict[str | None, Callable[[], Any]] = {
            None: lambda: None,
            "prompt-lookup": PromptLookup,
            "early-exit": lambda: EarlyExit(self._decoder),
        }
        settings = GenerationSettings(max_new_tokens=new_tokens)
        before, start = self._bytes(), time.perf_counter()
        with generate(self._decoder, prompt, settings, drafter=drafters[drafter]()) as generation:
            tokens, first_bytes = [], (0, 0)
            for token in generation:
                first_bytes = first_bytes if tokens else self._since(before)
                tokens.append(token.id)
            stats = generation.stats
        return {
            "tokens": tokens,
            "first_token_s": stats.first_token_s,
            "wall_s": time.perf_counter() - start,
            "round_trips": stats.round_trips,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "bytes": self._since(before),
            "first_token_bytes": first_bytes,
        }

    def naive(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """An answer without caches: the whole prefix travels, and is computed, for every token."""
        before, start, first, first_bytes = self._bytes(), time.perf_counter(), 0.0, (0, 0)
        ids = list(prompt)
        for _ in range(new_tokens):
            with self._decoder.open(len(ids)) as sequences:
                ids.append(int(sequences.extend([ids]).argmax()))
            if not first:
                first, first_bytes = time.perf_counter() - start, self._since(before)
        wall = time.perf_counter() - start
        return {
            "tokens": ids[len(prompt) :],
            "first_token_s": first,
            "wall_s": wall,
            "round_trips": new_tokens,
            "bytes": self._since(before),
            "first_token_bytes": first_bytes,
        }

    def prefill(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Bytes of a prompt, and of each token after it."""
        with self._decoder.open(len(prompt) + new_tokens) as sequences:
            before = self._bytes()
            token = int(sequences.extend([prompt]).argmax())
            prefill, before = self._since(before), self._bytes()
            for _ in range(new_tokens):
                token = int(sequences.extend([[token]]).argmax())
            decode = self._since(before)
        return {"prefill": prefill, "decode": decode}

    def open_load(self, lengths: list[int], new_tokens: int) -> dict[str, Any]:
        """Open sessions with pasts of these lengths, as clients with machines of their own would have them.

        What they send are rows made beforehand: nothing is computed here, so the server is what is measured.
        """
        hidden_size = self._decoder.segments.input_blocks.hidden_size
        chunk = self._decoder.plan.inference.prefill_tokens
        for length in lengths:
            session = self._trunk.open_session(length + new_tokens)
            for start in range(0, length, chunk):
                rows = min(chunk, length - start)
                session.extend(self._sealed(rows, hidden_size), [start], [rows]).result(120)
            self._load.append((session, length))
        self._row = self._sealed(1, hidden_size)
        return {"sessions": len(self._load)}

    def run_load(self, new_tokens: int, at_once: bool) -> dict[str, Any]:
        """So many tokens of each session, from where its past ended: all at once, or one session after the other."""
        start = time.perf_counter()
        if at_once:
            done = [self._run_session(session, length, new_tokens) for session, length in self._load]
            for event in done:
                event()
        else:
            for session, length in self._load:
                self._run_session(session, length, new_tokens)()
        return {"wall_s": time.perf_counter() - start, "tokens": new_tokens * len(self._load)}

    def close_load(self) -> dict[str, Any]:
        """End the sessions."""
        for session, _ in self._load:
            session.close()
        self._load.clear()
        return {}

    def _run_session(self, session: Any, length: int, new_tokens: int) -> Callable[[], None]:
        """Send a token whenever the one before it is answered; the result waits for the last one."""
        over, errors = threading.Event(), []
        position = length

        def answered(future: Any) -> None:
            nonlocal position
            if (error := future.exception()) is not None:
                errors.append(error)
            position += 1
            if error is not None or position == length + new_tokens:
                over.set()
                return
            send()

        def send() -> None:
            session.extend(self._row, [position], [1]).add_done_callback(answered)

        def wait() -> None:
            if not over.wait(300):
                raise TimeoutError("a session's tokens did not come")
            if errors:
                raise errors[0]

        send()
        return wait

    def _sealed(self, rows: int, hidden_size: int) -> Any:
        return self._trunk.seal(self._decoder.boundary.hidden(torch.randn(rows, hidden_size)))

    def _bytes(self) -> tuple[int, int]:
        up, down = self._trunk.num_bytes
        return up, down

    def _since(self, before: tuple[int, int]) -> tuple[int, int]:
        up, down = self._bytes()
        return up - before[0], down - before[1]


def split(settings: dict[str, Any], orders: Iterator[dict[str, Any]], tell: Callable[..., None]) -> None:
    """A client's process."""
    from fedsea.client.inference import open_decoder
    from fedsea.client.setup import ClientOptions

    torch.set_num_threads(settings["threads"])
    options = ClientOptions(
        server=settings["server"],
        identity=Path(settings["identity"]),
        run=Path(settings["run"]),
        threads=settings["threads"],
        device=settings["device"],
    )
    with open_decoder(options, base=True) as opened:
        side = Split(opened)
        tell(ready="split")
        for order in orders:
            tell(**getattr(side, order.pop("do"))(**order))


# --- central ----------------------------------------------------------------------------------------------------------


class _Clock:
    """A streamer that notes when the first token came; the first thing that it is given is the prompt."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter() - self.start)

    def end(self) -> None:
        """Nothing to do."""


def central(settings: dict[str, Any], orders: Iterator[dict[str, Any]], tell: Callable[..., None]) -> None:
    """The whole model in one process with transformers alone."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype, attn_implementation="sdpa")
    model.to(settings["device"]).eval()
    model.generation_config.eos_token_id = None
    tell(ready="central")
    for order in orders:
        ids = torch.tensor([order["prompt"]], device=settings["device"])
        clock, start = _Clock(), time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=order["new_tokens"],
            min_new_tokens=order["new_tokens"],
            do_sample=False,
            use_cache=order["cache"],
            pad_token_id=0,
            streamer=clock,
        )
        wall = time.perf_counter() - start
        tell(tokens=out[0, ids.shape[1] :].tolist(), first_token_s=clock.times[1], wall_s=wall)
