"""Training through `SplitCausalLM`: loss and gradients of the whole model, with transformers' and trl's trainers."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer

from fedsea.client.causal_lm import SplitCausalLM
from fedsea.errors import ConfigError
from fedsea.model import adapters
from tests.parity.test_decoding_parity import _decoder
from tests.parity.test_model_parity import NAMED

FAMILIES = ("llama_gqa_tied", "qwen2", "mistral_sliding", "glm4")
WIDTH = 12


def _pair(zoo, folder, name="llama_gqa", **sections):
    """The whole model with LoRA at the client's ends alone, and the split one with the same values."""
    from peft import LoraConfig, get_peft_model

    model_type, settings = NAMED[name]
    central = zoo.save(zoo.config(model_type, **settings), folder).model
    split = SplitCausalLM(_decoder(folder, adapter={"rank": 4, "alpha": 8.0, "trunk": "frozen"}, **sections))
    ends = split.decoder.segments.input_blocks, split.decoder.segments.output_blocks
    held = {name: tensor for segment in ends for name, tensor in adapters.trainable(segment).items()}
    modules = sorted({name.rpartition(".lora_")[0] for name in held})
    whole = get_peft_model(central, LoraConfig(r=4, lora_alpha=8, target_modules=modules))
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in whole.named_parameters()
        if parameter.requires_grad
    }
    assert parameters.keys() == held.keys()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            held[name].copy_(parameter)
    return whole, parameters, split, held


def _batch(side, seed=0, lengths=(5, 12, 7)):
    """Unequal rows; where there is padding there is no label, nor at the first token of a row padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(len(lengths), WIDTH, dtype=torch.long), torch.zeros(len(lengths), WIDTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(WIDTH - length, WIDTH)
        ids[row, at], mask[row, at] = torch.randint(3, 97, (length,), generator=generator), 1
    labels = ids.masked_fill(mask == 0, -100)
    first = torch.zeros_like(mask) if side == "right" else mask.cumsum(1) * mask == 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(first.bool(), -100)}


def _close(held, parameters):
    for name, parameter in parameters.items():
        error = (held[name].grad - parameter.grad).norm()
        assert error <= 1e-4 * parameter.grad.norm(), name


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_gradients_are_the_whole_models(name, side, zoo, tmp_path):
    whole, parameters, split, held = _pair(zoo, tmp_path, name)
    batch = _batch(side)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for extra in ({}, {"num_items_in_batch": 31}):
        losses = []
        for model, more in ((whole, {"position_ids": positions}), (split, {})):
            model.zero_grad()
            out = model(**batch, **more, **extra)
            out.loss.backward()
            losses.append(out.loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        _close(held, parameters)
    trunk = split.decoder.trunk._passes.trunk
    assert all(parameter.grad is None for parameter in trunk.model.parameters())


def test_rows_of_several_sequences_are_kept_apart(zoo, tmp_path):
    """As "padding-free" collators make them: positions that begin again."""
    whole, parameters, split, held = _pair(zoo, tmp_path)
    ids = _batch("right", lengths=(12,))["input_ids"]
    parts = [ids[:, :5], ids[:, 5:]]
    labels = ids.clone()
    labels[0, 5] = -100
    flat = torch.cat([torch.arange(5), torch.arange(7)])[None]
    out = split(ids, position_ids=flat, labels=labels)
    out.loss.backward()
    loss = sum(whole(part, labels=part).loss * (part.shape[1] - 1) for part in parts) / 10
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    _close(held, parameters)


def test_large_batch_travels_in_several_messages_and_activations_may_be_recomputed(zoo, tmp_path):
    whole, parameters, split, held = _pair(
        zoo, tmp_path, data={"max_tokens": WIDTH}, training={"micro_batch_sequences": 2}, inference={"max_sequences": 2}
    )
    split.activation_checkpointing_enable()
    split.train()
    batch = _batch("right", lengths=(12, 12, 11, 12, 10, 12))
    asked = []
    original = split.decoder.trunk.pull_back
    split.decoder.trunk.pull_back = lambda *args: asked.append(args) or original(*args)
    for model in (whole.train(), split):
        model(**batch).loss.backward()
    assert len(asked) > 1
    _close(held, parameters)


def test_what_a_trainer_says_of_recomputing_is_heeded(zoo, tmp_path):
    split = _pair(zoo, tmp_path / "base", partition={"input_blocks": 2, "output_blocks": 1})[2]
    asked = {"every_n_layers": 2, "offload": True, "preserve_rng_state": False}
    _trainer(
        split, tmp_path / "out", activation_checkpointing=True, activation_checkpointing_kwargs=asked, max_steps=1
    ).train()
    blocks = [module for module in split.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [block.gradient_checkpointing for block in blocks] == [True, False, True]
    told = {"offload": True, "settings": {"preserve_rng_state": False}}
    assert all(block._gradient_checkpointing_func.keywords == told for block in blocks)
    with pytest.raises(ConfigError, match="use_reentrant"):
        split.activation_checkpointing_enable({"use_reentrant": True})
    split.activation_checkpointing_disable()
    assert not split.is_activation_checkpointing


def test_nothing_is_asked_back_where_nothing_below_the_trunk_trains(zoo, tmp_path):
    zoo.save(zoo.config("llama"), tmp_path)
    split = SplitCausalLM(_decoder(tmp_path, adapter={"rank": 4, "alpha": 8.0, "trunk": "frozen", "input": "frozen"}))
    split.decoder.trunk.pull_back = None
    split(**_batch("right")).loss.backward()
    split.enable_input_require_grads()  # as trainers do for adapters with activations recomputed
    split(**_batch("right")).loss.backward()
    assert any(parameter.grad is not None for parameter in split.parameters())


def _rows(number=16):
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 5, (number,), generator=generator).tolist()
    return [{"input_ids": ([5, 6, 7, 8, 9] * 5)[start : start + 20]} for start in starts]


def _trainer(split, folder, **changes):
    from transformers import Trainer, TrainingArguments

    rows = [{**row, "labels": row["input_ids"]} for row in _rows()]
    settings = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return Trainer(split, TrainingArguments(**{**settings, **changes}), train_dataset=rows)


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_takes_twenty_steps_as_on_the_whole_model(zoo, tmp_path):
    whole, _, split, _ = _pair(zoo, tmp_path / "base")
    found = []
    for model in (whole, split):
        trainer = _trainer(model, tmp_path / "out")
        trainer.train()
        found.append(_losses(trainer))
    assert len(found[1]) == 20
    assert found[1][-1] < 0.7 * found[1][0]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_checkpoints_hold_what_is_trained_here_and_training_goes_on_from_them(zoo, tmp_path):
    _, _, split, held = _pair(zoo, tmp_path / "base")
    whole_run = _trainer(split, tmp_path / "out", save_strategy="steps", save_steps=10)
    whole_run.train()
    final = {name: tensor.detach().clone() for name, tensor in held.items()}
    again = _pair(zoo, tmp_path / "base")[2]
    trainer = _trainer(again, tmp_path / "out")
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    assert _losses(trainer)[-10:] == pytest.approx(_losses(whole_run)[-10:], rel=1e-4)
    fresh = _pair(zoo, tmp_path / "base")
    split.save_pretrained(tmp_path / "saved")
    fresh[2].load_trained(tmp_path / "saved")
    assert all(torch.equal(fresh[3][name], final[name]) for name in final)
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 100_000
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        split.load_trained(tmp_path)
    zoo.save(zoo.config("llama"), tmp_path / "other")
    other = SplitCausalLM(_decoder(tmp_path / "other", adapter={"rank": 2, "alpha": 8.0}))
    with pytest.raises(ConfigError, match="another plan"):
        other.load_trained(tmp_path / "saved")


def test_what_was_trained_is_what_generates(zoo, tmp_path):
    whole, parameters, split, held = _pair(zoo, tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = split.generate(prompt, **settings).tolist()
    _trainer(split, tmp_path / "out").train()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(held[name])
    split.eval()
    after = split.generate(prompt, **settings).tolist()
    assert after == whole.eval().generate(prompt, **settings).tolist()
    assert after != before


def test_sft_trainer_takes_twenty_steps_and_the_loss_falls(zoo, tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    split = _pair(zoo, tmp_path / "base")[2]
    words = Tokenizer(models.WordLevel({f"t{token}": token for token in range(97)}, unk_token="t1"))
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        max_length=32,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=split,
        args=arguments,
        train_dataset=Dataset.from_list(_rows()),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2"),
    )
    trainer.train()
    losses = _losses(trainer)
    assert len(losses) == 20
    assert losses[-1] < 0.7 * losses[0]
