"""Train the quickstart's base model: a tokenizer and a small LLaMA on the corpus of `make_silos.py --base`.

    python scripts/make_silos.py --base --out /tmp/base
    python scripts/make_tiny_model.py --corpus /tmp/base/base.jsonl --out src/fedsea/assets/model

The silos' text is never seen: a base model meets its clients' domains for the first time in the federation. One
thread and one seed make a run repeatable on one machine; another processor rounds differently and gives a model
that differs in its last digits.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = Path(__file__).parent / "texts" / "words.txt"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's pieces, but every digit by itself, so that a number is copied digit by digit."""
CONTEXT_TOKENS = 256
NUM_HELD_OUT = 240
IGNORE = -100
console = Console()


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(rows: list[dict[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; every byte is in the vocabulary, so nothing is ever unknown.

    Single words of many professions weigh more than the corpus gives them, as they would in a general tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["prompt"] + row["completion"] for row in rows]
    words = WORDS.read_text(encoding="utf-8").split()
    vocabulary = [f" {word}" for word in words] * (len(rows) // 150)
    tokenizer.train_from_iterator([*texts, *vocabulary], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Six blocks, so that one input and one output block leave a trunk of four."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """`<s> prompt completion </s>`, cut at the context."""
    texts = [row["prompt"] + row["completion"] for row in rows]
    return [[*ids[: CONTEXT_TOKENS - 1], tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def epoch(sequences: list[list[int]], batch_sequences: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Batches of like length in random order: little padding, and still a new mixture every epoch."""
    shuffled = rng.sample(sequences, len(sequences))
    pool = batch_sequences * 40
    batches = []
    for start in range(0, len(shuffled), pool):
        by_length = sorted(shuffled[start : start + pool], key=len)
        batches += [by_length[i : i + batch_sequences] for i in range(0, len(by_length), batch_sequences)]
    yield from rng.sample(batches, len(batches))


def loss_of(model: LlamaForCausalLM, batch: list[list[int]], pad: int) -> torch.Tensor:
    """Mean loss over the batch's tokens, prompts included."""
    longest = max(map(len, batch))
    ids = torch.tensor([seq + [pad] * (longest - len(seq)) for seq in batch])
    labels = torch.tensor([seq + [IGNORE] * (longest - len(seq)) for seq in batch])
    return model(input_ids=ids, labels=labels).loss  # right padding: causal attention never looks at it


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, sequences: list[list[int]], pad: int) -> float:
    model.eval()
    total = sum(float(loss_of(model, [seq], pad)) * (len(seq) - 1) for seq in sequences)
    model.train()
    return total / sum(len(seq) - 1 for seq in sequences)


def train(model: LlamaForCausalLM, sequences: list[list[int]], pad: int, args: argparse.Namespace) -> None:
    """AdamW, warm-up and cosine decay to a tenth, over whole epochs."""
    rng = random.Random(args.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    num_steps = args.epochs * sum(1 for _ in epoch(sequences, args.batch, random.Random(0)))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=num_steps)
        batches = (batch for _ in range(args.epochs) for batch in epoch(sequences, args.batch, rng))
        for step, batch in enumerate(batches):
            decay = 0.55 + 0.45 * math.cos(math.pi * step / num_steps)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 100) * decay
            loss = loss_of(model, batch, pad)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, description=f"loss {loss.item():.3f}")
            if step % 100 == 0 and not console.is_terminal:
                console.print(f"step {step}/{num_steps}: loss {loss.item():.3f}")


@torch.no_grad()
def show_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> None:
    """Greedy and sampled answers to prompts that the model has not seen."""
    model.eval()
    for row in rows:
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        for how in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
            out = model.generate(**inputs, max_new_tokens=90, **how)[0, inputs["input_ids"].shape[1] :]
            console.print(f"{row['prompt']}[{'sampled' if how['do_sample'] else 'greedy'}] ", end="", markup=False)
            console.print(tokenizer.decode(out, skip_special_tokens=True) + "\n", markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="base.jsonl from make_silos.py --base")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the tokenizer")
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rows = read_rows(args.corpus)
    tokenizer = train_tokenizer(rows, args.vocab)
    model = build_model(args.vocab, tokenizer)
    sequences = encode(rows, tokenizer)
    lengths = sorted(map(len, sequences))
    console.print(
        f"{model.num_parameters():,} parameters; {len(rows):,} rows, {sum(lengths):,} tokens, "
        f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
    )
    train(model, sequences[NUM_HELD_OUT:], tokenizer.pad_token_id, args)
    loss = held_out_loss(model, sequences[:NUM_HELD_OUT], tokenizer.pad_token_id)
    console.print(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    show_samples(model, tokenizer, rows[:8])
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for file in args.out.iterdir():
        file.chmod(0o644)  # safetensors makes its files readable by the owner alone; these ship in a package
    size = sum(file.stat().st_size for file in args.out.iterdir())
    console.print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
