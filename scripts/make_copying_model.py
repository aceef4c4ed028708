"""Teach a small model to quote, for `decode.py --real`: speculation by look-up pays where answers repeat the passage.

    python scripts/make_copying_model.py MODELDIR TRAIN.jsonl VAL.jsonl OUT

A row's longest text is a passage. The task is extractive: "quote the sentence that begins so and so". Writes a model to
`OUT/model`, and prompts about passages that it has not seen to `OUT/prompts.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

LENGTH = 320
BATCH = 16
BEGINNING = 3
"""Words of the sentence that the question gives."""


def passages(path: Path) -> list[list[str]]:
    """The sentences of each row's longest text."""
    with path.open(encoding="utf-8") as file:
        texts = [max((v for v in json.loads(line).values() if isinstance(v, str)), key=len) for line in file]
    cut = [[s.strip() for s in re.split(r"(?<=[.!?])\s+|\n", text)] for text in texts]
    return [[s for s in sentences if len(s.split()) > BEGINNING + 2] for sentences in cut]


def exercise(
    sentences: list[str], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> tuple[list[int], list[int]] | None:
    """Prompt and answer as token ids, within `LENGTH` together; None if the passage has no fit sentences."""
    for _ in range(8):
        start = rng.randrange(max(1, len(sentences) - 2))
        shown = sentences[start : start + rng.randint(2, 4)]
        if not shown:
            return None
        quoted = rng.choice(shown)
        beginning = " ".join(quoted.split()[:BEGINNING])
        question = " ".join(shown) + f"\nQuote the sentence that begins: {beginning}\nAnswer:"
        prompt = tokenizer(question, add_special_tokens=True)["input_ids"]
        whole = tokenizer(f"{question} {quoted}", add_special_tokens=True)["input_ids"]
        if whole[: len(prompt)] == prompt and len(whole) + 1 <= LENGTH:
            return prompt, [*whole[len(prompt) :], tokenizer.eos_token_id]
    return None


def batch(exercises: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets, padded at the right; the passage is learned too, with the answer."""
    longest = max(len(p) + len(a) for p, a in exercises)
    ids = torch.zeros(len(exercises), longest, dtype=torch.long)
    targets = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(exercises):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole)] = whole
        targets[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return ids, targets


def main() -> None:
    """Train, and say now and then how much of an answer is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "val", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps, pct_start=0.1)
    train = passages(args.train)
    tests = [e for s in passages(args.val) if (e := exercise(s, tokenizer, rng)) is not None][: args.prompts]
    start = time.perf_counter()
    for step in range(args.steps):
        exercises = [e for _ in range(BATCH) if (e := exercise(rng.choice(train), tokenizer, rng)) is not None]
        ids, targets = batch(exercises)
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                ids, targets = batch(tests)
                right = (model(ids).logits.argmax(-1) == targets)[targets != -100].float().mean()
            text = f"step {step + 1}/{args.steps}: loss {loss:.3f}, {right:.1%} of unseen answers' tokens right"
            print(f"{text}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    with (args.out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for prompt, _ in tests:
            file.write(json.dumps({"prompt": tokenizer.decode(prompt, skip_special_tokens=True)}) + "\n")


if __name__ == "__main__":
    main()
