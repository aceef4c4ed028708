"""Decoding with a split model: against central `generate`, over slow links, with drafts, and many sessions at once.

    python benchmarks/decode.py --shape 100m
    python benchmarks/decode.py --real MODELDIR DATA.jsonl --rtt-ms 50 --drafter prompt-lookup

A server and a client (mutual TLS between them, k = m = 1), and a process with the whole model and transformers alone,
are given the same prompts and take turns; figures are medians over the turns. See README.md for what each one means.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _harness import Worker, Workspace, arguments, finish, workspace
from _inputs import SHAPES

NAME = "client"
BYTES_PER_VALUE = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
REFERENCE_BYTES = 113e6
"""What the reference moves before the second token of a prompt of 512 tokens, with 4096 columns in fp16."""
REFERENCE_HIDDEN = 4096
PREFILL_TOKENS = 512


def plan_sections(args: argparse.Namespace, codec: str) -> dict[str, dict[str, Any]]:
    """Adapters on every linear layer, as after training; the central side has none."""
    return {
        "model": {"dtype": args.dtype},
        "adapter": {"rank": args.rank},
        "data": {"loss_on": "all"},
        "wire": {"hidden": codec},
        "inference": {"max_tokens": args.max_tokens, "kv_memory_mb": args.kv_memory_mb, "max_sequences": 256},
    }


def say(worker: Worker, do: str, **settings: Any) -> dict[str, Any]:
    """Give an order, and add what it cost this process."""
    cpu = worker.cpu_s
    answer = worker.ask({"do": do, **settings})
    return {**answer, "cpu_s": worker.cpu_s - cpu}


class Federation:
    """A server, and clients at any distance of it.

    Args:
        space: Where.
        args: Of the command line.
        server: The server's process.
        address: Where it listens.
    """

    def __init__(self, space: Workspace, args: argparse.Namespace, server: Worker, address: str) -> None:
        self.server = server
        self._space = space
        self._args = args
        self._address = address

    @contextlib.contextmanager
    def client(self, rtt_ms: float = 0.0) -> Iterator[Worker]:
        """A client at the end of a link; 0 is none."""
        with contextlib.ExitStack() as stack:
            address = self._address
            if rtt_ms:
                proxy = self._space.start("proxy", target=address, rtt_ms=rtt_ms, mbit=self._args.mbit)
                address = stack.enter_context(proxy).answer()["address"]
            client = stack.enter_context(self._space.decoder(NAME, address, device=self._args.device))
            client.answer()
            yield client

    def counts(self) -> tuple[float, float, int, int]:
        """CPU seconds of the engine thread at decoding and of the whole process, tokens and batches so far."""
        status = self.server.ask()["status"]
        inference = status["inference"]
        engine_s = status["engine_cpu_s"].get("decode", 0.0)
        return engine_s, self.server.cpu_s, inference["tokens"], inference["batches"]


@contextlib.contextmanager
def federation(space: Workspace, args: argparse.Namespace, codec: str) -> Iterator[Federation]:
    """A running one."""
    plan = space.write_plan(plan_sections(args, codec), [NAME])
    with space.server(plan, device=args.device, probes=False) as (server, address):
        yield Federation(space, args, server, address)


# --- one session ------------------------------------------------------------------------------------------------------


def prompts_of(args: argparse.Namespace, client: Worker, vocab_size: int) -> list[list[int]]:
    """Of random words, or of the data's first rows."""
    if args.real is None:
        rng = random.Random(0)
        return [[rng.randrange(1, vocab_size) for _ in range(args.tokens)] for _ in range(args.prompts)]
    prompts = []
    with Path(args.real[1]).open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            whole = "prompt" in row
            text = row["prompt"] if whole else max((value for value in row.values() if isinstance(value, str)), key=len)
            ids = say(client, "encode", text=text)["ids"]
            if whole and len(ids) + args.new_tokens <= args.max_tokens:
                prompts.append(ids)
            elif not whole and len(ids) >= args.tokens:
                prompts.append(ids[: args.tokens])
            if len(prompts) == args.prompts:
                return prompts
    raise SystemExit(f"{args.real[1]} has only {len(prompts)} rows of {args.tokens} tokens: ask for fewer or shorter.")


def rate(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of one way to decode; the first token is part neither of the tokens a second nor of bytes a token."""
    figures = {
        "first_token_s": statistics.median(answer["first_token_s"] for answer in answers),
        "tokens_per_s": statistics.median(_tokens_per_s(answer) for answer in answers),
    }
    if "round_trips" in answers[0]:
        new = sum(len(answer["tokens"]) for answer in answers)
        figures["tokens_per_round_trip"] = new / sum(answer["round_trips"] for answer in answers)
        later_bytes = sum(sum(answer["bytes"]) - sum(answer["first_token_bytes"]) for answer in answers)
        figures["bytes_per_token"] = later_bytes / max(1, new - len(answers))
    if any(answer.get("drafted") for answer in answers):
        figures["acceptance"] = sum(a["accepted"] for a in answers) / sum(a["drafted"] for a in answers)
    return figures


def _tokens_per_s(answer: dict[str, Any]) -> float:
    return (len(answer["tokens"]) - 1) / max(1e-9, answer["wall_s"] - answer["first_token_s"])


def at_distance(args: argparse.Namespace, fed: Federation, prompts: list[list[int]], rtt_ms: float) -> dict[str, Any]:
    """Split, with drafts, and without caches, over one link."""
    with fed.client(rtt_ms) as client:
        say(client, "generate", prompt=prompts[0], new_tokens=4)
        plain, drafted, naive = [], [], []
        for prompt in prompts:
            plain.append(say(client, "generate", prompt=prompt, new_tokens=args.new_tokens))
            order = {"prompt": prompt, "new_tokens": args.new_tokens, "drafter": args.drafter}
            drafted.append(say(client, "generate", **order))
        for prompt in prompts[:1]:
            naive.append(say(client, "naive", prompt=prompt, new_tokens=max(2, args.new_tokens // 4)))
    speedups = [a["wall_s"] / b["wall_s"] for a, b in zip(plain, drafted, strict=True)]
    result = {
        "speculation_speedup": statistics.median(speedups),
        "same_tokens": all(a["tokens"] == b["tokens"] for a, b in zip(plain, drafted, strict=True)),
        "split": rate(plain),
        "speculation": rate(drafted),
        "naive": rate(naive),
    }
    print(f"RTT {rtt_ms:g} ms: speedup {result['speculation_speedup']:.2f}, {result['split']}", file=sys.stderr)
    return result


def against_central(
    args: argparse.Namespace, space: Workspace, fed: Federation, prompts: list[list[int]]
) -> dict[str, Any]:
    """Split over the loopback and central in turns."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(fed.client())
        settings = {"model": str(space.model), "dtype": args.dtype, "device": args.device}
        central = stack.enter_context(space.start("central_decoder", **settings))
        central.answer()
        turns: list[tuple[dict[str, Any], dict[str, Any], float]] = []
        for number in range(args.pairs + 1):
            order = {"prompt": prompts[number % len(prompts)], "new_tokens": args.new_tokens}

            def ours(order: dict[str, Any] = order) -> tuple[dict[str, Any], float]:
                server_s = fed.server.cpu_s
                answer = say(client, "generate", **order)
                return answer, fed.server.cpu_s - server_s

            def theirs(order: dict[str, Any] = order) -> dict[str, Any]:
                return say(central, "generate", **order, cache=True)

            if number % 2:
                whole = theirs()
                split, server_s = ours()
            else:
                split, server_s = ours()
                whole = theirs()
            turns.append((split, whole, server_s))
            ratio = _tokens_per_s(split) / _tokens_per_s(whole)
            rates = f"{_tokens_per_s(split):.2f} and {_tokens_per_s(whole):.2f} tokens/s"
            print(f"pair {number}/{args.pairs}: split over central {ratio:.3f} ({rates})", file=sys.stderr)
        uncached = say(central, "generate", prompt=prompts[0], new_tokens=max(2, args.new_tokens // 4), cache=False)
    turns = turns[1:]
    ratios = [_tokens_per_s(split) / _tokens_per_s(whole) for split, whole, _ in turns]
    per_token = 1 / args.new_tokens
    return {
        "split_over_central": statistics.median(ratios),
        "split_over_central_range": [min(ratios), max(ratios)],
        "same_tokens_as_central": sum(s["tokens"] == w["tokens"] for s, w, _ in turns) / len(turns),
        "client_cpu_s_per_token": statistics.median(split["cpu_s"] for split, *_ in turns) * per_token,
        "server_cpu_s_per_token": statistics.median(server_s for *_, server_s in turns) * per_token,
        "central_cpu_s_per_token": statistics.median(whole["cpu_s"] for _, whole, _ in turns) * per_token,
        "split": rate([split for split, *_ in turns]),
        "central": rate([whole for _, whole, _ in turns]),
        "central_without_cache": rate([uncached]),
    }


# --- bytes ------------------------------------------------------------------------------------------------------------


def bytes_figures(args: argparse.Namespace, space: Workspace, codec: str, hidden_size: int) -> dict[str, float]:
    """Frames of a prompt and of each token after it, against the least that can travel."""
    new_tokens, tokens = 16, min(PREFILL_TOKENS, args.max_tokens - 32)
    with federation(space, args, codec) as fed, fed.client() as client:
        found = say(client, "prefill", prompt=[1 + i % 200 for i in range(tokens)], new_tokens=new_tokens)
    ideal = tokens * hidden_size * BYTES_PER_VALUE[codec]
    reference = REFERENCE_BYTES * hidden_size / REFERENCE_HIDDEN
    up, down = found["decode"]
    return {
        "token_bytes_up": up / new_tokens,
        "token_bytes_down": down / new_tokens,
        "token_bytes_ideal": float(hidden_size * BYTES_PER_VALUE[codec]),
        "prefill_over_ideal": max(found["prefill"]) / ideal,
        "first_token_bytes": float(sum(found["prefill"])),
        "first_token_bytes_over_reference": sum(found["prefill"]) / (reference * tokens / PREFILL_TOKENS),
    }


# --- many sessions ----------------------------------------------------------------------------------------------------


def many(args: argparse.Namespace, fed: Federation, client: Worker, num_sessions: int) -> dict[str, float | None]:
    """Sessions of unequal lengths, all at once and one after the other, in turns."""
    rng = random.Random(num_sessions)
    lengths = [rng.randint(max(1, args.tokens // 4), args.tokens) for _ in range(num_sessions)]
    say(client, "open_load", lengths=lengths, new_tokens=args.new_tokens)
    engine: dict[bool, list[float]] = {True: [], False: []}
    process: dict[bool, list[float]] = {True: [], False: []}
    wall: dict[bool, list[float]] = {True: [], False: []}
    in_batch = []
    for turn in range(args.pairs + 1):
        for at_once in (True, False) if turn % 2 else (False, True):
            before = fed.counts()
            answer = say(client, "run_load", new_tokens=args.new_tokens, at_once=at_once)
            engine_s, process_s, tokens, batches = (a - b for a, b in zip(fed.counts(), before, strict=True))
            if turn:
                engine[at_once].append(tokens / engine_s if engine_s else 0.0)
                process[at_once].append(tokens / process_s)
                wall[at_once].append(tokens / answer["wall_s"])
                in_batch += [tokens / batches] if at_once else []
    say(client, "close_load")

    def ratio(rates: dict[bool, list[float]]) -> float:
        return statistics.median(a / b if b else 0.0 for a, b in zip(rates[True], rates[False], strict=True))

    # The engine thread's CPU time is the work only where it does all of it itself: not on a GPU, not with helpers.
    alone = args.device == "cpu" and args.threads == 1
    result = {
        "batched_over_single_cpu": ratio(engine) if alone else None,
        "batched_over_single_server_cpu": ratio(process),
        "batched_over_single_wall": ratio(wall),
        "sessions_in_a_batch": statistics.median(in_batch),
        "engine_tokens_per_cpu_s": statistics.median(engine[True]),
        "single_engine_tokens_per_cpu_s": statistics.median(engine[False]),
        "server_tokens_per_cpu_s": statistics.median(process[True]),
        "single_server_tokens_per_cpu_s": statistics.median(process[False]),
        "tokens_per_s": statistics.median(wall[True]),
    }
    print(f"{num_sessions} sessions: {result}", file=sys.stderr)
    return result


# --- all --------------------------------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument(
        "--real",
        nargs=2,
        metavar=("MODELDIR", "DATA"),
        help="a trained model, and rows of its text; of those with a prompt, the whole prompt",
    )
    parser.add_argument("--device", default="cpu", help="of all processes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "bf16"), default="float32", help="of the weights")
    parser.add_argument("--codec", choices=tuple(BYTES_PER_VALUE), help="default: fp32, or bf16 with such weights")
    parser.add_argument("--rank", type=int, default=8, help="of the split model's adapters")
    parser.add_argument("--rtt-ms", type=float, nargs="*", default=[0, 20, 50, 100])
    parser.add_argument("--mbit", type=float, default=0.0, help="of the emulated link, each way; 0: no limit")
    parser.add_argument("--drafter", choices=("prompt-lookup", "early-exit"), default="prompt-lookup")
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 4, 16, 32])
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt; of concurrent sessions, the longest")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=3, help="at each distance")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each side")
    parser.add_argument("--kv-memory-mb", type=int, default=4096)
    args = parser.parse_args()
    args.codecs = ("fp16", "int8")
    if args.tiny:
        args.shape, args.tokens, args.new_tokens, args.prompts, args.pairs = "tiny", 24, 8, 1, 1
        args.rtt_ms, args.sessions, args.codecs = args.rtt_ms[1:2], [2], ()
    args.dtype = "bfloat16" if args.dtype == "bf16" else args.dtype
    args.codec = args.codec or ("bf16" if args.dtype == "bfloat16" else "fp32")
    return args


def main() -> None:
    """One session against central, at every distance, bytes, and many sessions."""
    args = parsed()
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "codecs")}
    model = SHAPES[args.shape] if args.real is None else Path(args.real[0])
    if args.real is not None:
        config = json.loads((Path(args.real[0]) / "config.json").read_text(encoding="utf-8"))
        hidden_size, vocab_size, context = (
            config[key] for key in ("hidden_size", "vocab_size", "max_position_embeddings")
        )
        settings |= {"shape": None, "real": [Path(name).name for name in args.real]}
    else:
        hidden_size, vocab_size, context = SHAPES[args.shape].hidden_size, SHAPES[args.shape].vocab_size, 2048
    args.max_tokens = min(2048, context)
    result: dict[str, Any] = {}
    with workspace(model, args.threads, args.dtype, args.device) as space:
        space.enroll(NAME)
        with federation(space, args, args.codec) as fed:
            with fed.client() as client:
                prompts = prompts_of(args, client, vocab_size)
                by_sessions = {str(count): many(args, fed, client, count) for count in args.sessions}
            result |= against_central(args, space, fed, prompts)
            result["by_rtt_ms"] = {f"{rtt:g}": at_distance(args, fed, prompts, rtt) for rtt in args.rtt_ms}
        for codec in dict.fromkeys((args.codec, *args.codecs)):
            result.setdefault("bytes", {})[codec] = bytes_figures(args, space, codec, hidden_size)
    if by_sessions:
        most = "16" if "16" in by_sessions else max(by_sessions, key=int)
        keys = ("batched_over_single_cpu", "batched_over_single_server_cpu")
        result |= {key: by_sessions[most][key] for key in keys} | {"num_sessions": int(most)}
        result["by_sessions"] = by_sessions
    if result["by_rtt_ms"]:
        farthest = "50" if "50" in result["by_rtt_ms"] else max(result["by_rtt_ms"], key=float)
        result |= {key: result["by_rtt_ms"][farthest][key] for key in ("speculation_speedup", "same_tokens")}
        result["at_rtt_ms"] = float(farthest)
    result |= {
        key: result["bytes"][args.codec][key] for key in ("token_bytes_up", "token_bytes_down", "prefill_over_ideal")
    }
    finish("decode", settings, result, args.out)


if __name__ == "__main__":
    main()
