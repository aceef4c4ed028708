"""What segments promise beside parity: precision, memory, packing, losses, groups and clear refusals."""

import threading

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from fedsea.errors import ConfigError
from fedsea.model import adapters, attention, head
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_input_blocks, load_output_blocks, load_trunk
from fedsea.model.packing import packing, remembers, run
from fedsea.model.trunk import TrunkPart
from fedsea.plan import AdapterSection
from fedsea.types import IGNORE, BlockRange, Partition

F32 = torch.float32
NUM_BLOCKS = 5
CUT = Partition(1, 1)
RANGE = BlockRange(1, 4)
LENGTHS = (3, 7, 2, 7)
TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaMA-like model whose attention window is shorter than its sequences."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    folder = tmp_path_factory.mktemp("mistral")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return open_checkpoint(str(folder))


@pytest.fixture
def hidden():
    return torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets():
    targets = torch.randint(0, 97, (TOKENS,), generator=torch.Generator().manual_seed(2))
    targets[::3] = IGNORE
    return targets


def gradients(segment):
    return {name: p.grad for name, p in segment.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_near_float32(checkpoint, hidden, targets, dtype):
    ids = targets.clamp(min=0)
    segments = {
        t: (
            load_input_blocks(checkpoint, CUT, dtype=t),
            load_trunk(checkpoint, RANGE, dtype=t),
            load_output_blocks(checkpoint, CUT, dtype=t),
        )
        for t in (F32, dtype)
    }
    for segment in segments[dtype]:
        assert {p.dtype for p in segment.model.parameters()} == {dtype}
        assert segment.dtype == dtype
        assert not segment.padded
    losses = {}
    for t, (first, trunk, last) in segments.items():
        out = trunk(first(ids, LENGTHS), LENGTHS)
        assert out.dtype == t
        losses[t] = last.loss(out, LENGTHS, targets)
    assert losses[dtype].dtype == F32
    assert losses[dtype].item() == pytest.approx(losses[F32].item(), rel=1e-2)
    # Whatever the wire delivers is cast on entry.
    assert segments[dtype][1](hidden.double(), LENGTHS).dtype == dtype


def test_autocast_computes_in_bf16_and_keeps_float32_weights(checkpoint, hidden):
    plain = load_trunk(checkpoint, RANGE, dtype=F32)
    auto = load_trunk(checkpoint, RANGE, dtype=F32, autocast=torch.bfloat16)
    got, expected = auto(hidden, LENGTHS), plain(hidden, LENGTHS)
    assert not torch.equal(got, expected)
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert {p.dtype for p in auto.model.parameters()} == {F32}


def test_every_module_is_in_the_mode_that_was_switched_and_is_not_told_again(checkpoint, monkeypatch):
    trunk = load_trunk(checkpoint, RANGE, dtype=F32)
    adapters.attach(trunk, AdapterSection(rank=2, dropout=0.5), "adapter", 0)
    for training in (False, True, False):
        trunk.switch(training=training)
        assert {module.training for module in trunk.model.modules()} == {training}
    monkeypatch.setattr(trunk.model, "train", lambda _: pytest.fail("its modules were told again"))
    trunk.switch(training=False)


def test_activation_checkpointing_recomputes_with_the_same_gradients(checkpoint, hidden):
    found, calls = [], []
    for recompute in (False, True):
        trunk = load_trunk(checkpoint, RANGE, dtype=F32, activation_checkpointing=recompute)
        trunk.model.train()
        norm = trunk.model.get_submodule("model.layers.2.input_layernorm")
        norm.register_forward_hook(lambda *_, recompute=recompute: calls.append(recompute))
        entered = hidden.clone().requires_grad_()
        out = trunk(entered, LENGTHS)
        # Autograd may run the backward pass, and with it the recomputation, in a thread of its own.
        thread = threading.Thread(target=out.backward, args=(torch.ones_like(out),))
        thread.start()
        thread.join()
        found.append({"": entered.grad, **gradients(trunk)})
    assert (calls.count(False), calls.count(True)) == (1, 2)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_block_recomputes_and_what_it_starts_from_may_be_kept_in_the_hosts_memory(
    checkpoint, hidden, every, offload, monkeypatch
):
    kept, calls, found = [], [], []

    def watched(**settings):
        kept.append(settings)
        return save_on_cpu(**settings)

    monkeypatch.setattr(attention, "save_on_cpu", watched)
    for recompute in (False, True):
        trunk = load_trunk(checkpoint, RANGE, dtype=F32)
        if recompute:
            attention.checkpoint_activations(trunk.model.train(), every, offload=offload)
            for block in trunk.blocks:
                norm = trunk.model.get_submodule(f"model.layers.{block}.input_layernorm")
                norm.register_forward_hook(lambda *_, block=block: calls.append(block))
        entered = hidden.clone().requires_grad_()
        trunk(entered, LENGTHS).square().sum().backward()
        found.append({"": entered.grad, **gradients(trunk)})
    expected = [2 if number % every == 0 else 1 for number in range(len(trunk.blocks))]
    assert [calls.count(block) for block in trunk.blocks] == expected
    assert len(kept) == (expected.count(2) if offload else 0)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize(
    ("asked", "says"), [({"every_n_layers": 0}, "give 1 or more"), ({"settings": {"use_reentrant": True}}, "reentran")]
)
def test_what_recomputation_cannot_do_is_refused(checkpoint, asked, says):
    with pytest.raises(ConfigError, match=says):
        attention.checkpoint_activations(load_trunk(checkpoint, RANGE, dtype=F32).model, **asked)


def test_the_padded_fallback_equals_the_packed_path(checkpoint, hidden):
    trunk = load_trunk(checkpoint, RANGE, dtype=F32)
    decoder, results = trunk.model.get_submodule("model"), []
    for padded in (False, True):
        entered = hidden.clone().requires_grad_()
        out = run(decoder, entered, LENGTHS, padded=padded)
        out.square().sum().backward()
        results.append((out.detach(), entered.grad))
    torch.testing.assert_close(results[0], results[1])


def test_a_family_that_mixes_packed_sequences_is_found_and_padded(checkpoint, hidden):
    trunk = load_trunk(checkpoint, RANGE, dtype=F32)
    assert not trunk.padded

    def shift_in_time(module, args, output):
        return output + F.pad(output, (0, 0, 1, 0))[..., :-1, :]

    trunk.model.get_submodule("model.layers.1.input_layernorm").register_forward_hook(shift_in_time)
    trunk.choose_packing()
    assert trunk.padded
    alone = torch.cat([trunk(part, [len(part)]) for part in hidden.split(LENGTHS)])
    torch.testing.assert_close(trunk(hidden, LENGTHS), alone)


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [(0.0, True), (0.5, False), (float("nan"), True), (AttributeError(), False)],
    ids=["same", "other", "not-finite", "failing"],
)
def test_what_a_block_forgets_between_two_extensions_is_found(fault, verdict):
    """What is not finite is no matter of caches, and has its own error."""

    def extending(hidden_TH, extension):
        if isinstance(fault, Exception):
            raise fault
        return hidden_TH * (2.0 + (fault if extension.caches[0].length else 0.0))

    assert remembers(lambda hidden_TH, _: 2.0 * hidden_TH, extending, 8, torch.device("cpu")) is verdict


def test_memory_that_is_short_is_not_taken_for_what_a_block_forgets():
    def extending(_hidden_TH, _extension):
        raise MemoryError

    with pytest.raises(MemoryError):
        remembers(lambda hidden_TH, _: hidden_TH, extending, 8, torch.device("cpu"))


def test_lengths_first_seen_in_inference_serve_training(checkpoint, hidden):
    packing.cache_clear()
    trunk = load_trunk(checkpoint, RANGE, dtype=F32)
    with torch.inference_mode():
        expected = trunk(hidden, LENGTHS)
    entered = hidden.clone().requires_grad_()
    out = trunk(entered, LENGTHS)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected.clone())


@pytest.mark.parametrize("chunk_elements", [97 * 4, 2**24])
@pytest.mark.parametrize("train_head", [True, False])
def test_loss_and_its_gradients_equal_cross_entropy_of_all_logits(
    checkpoint, hidden, targets, monkeypatch, chunk_elements, train_head
):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk_elements)
    last = load_output_blocks(checkpoint, CUT, dtype=F32)
    last.model.lm_head.weight.requires_grad_(train_head)
    results = []
    for chunked in (True, False):
        last.model.zero_grad()
        entered = hidden.clone().requires_grad_()
        if chunked:
            loss = last.loss(entered, LENGTHS, targets)
        else:
            loss = F.cross_entropy(last(entered, LENGTHS), targets, reduction="sum", ignore_index=IGNORE)
        (loss / 7).backward()
        results.append((loss.detach(), {"": entered.grad, **gradients(last)}))
    assert results[0][0].shape == ()
    assert ("lm_head.weight" in results[0][1]) == train_head
    torch.testing.assert_close(results[0], results[1])
    with torch.no_grad():
        torch.testing.assert_close(last.loss(hidden, LENGTHS, targets), results[1][0])


def test_loss_never_holds_all_logits(checkpoint, hidden, targets, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 97 * 4)
    last, rows = load_output_blocks(checkpoint, CUT, dtype=F32), []
    last.model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[-2]))
    last.loss(hidden, LENGTHS, targets)
    assert max(rows) == 4
    assert sum(rows) == int((targets != IGNORE).sum())


def test_loss_without_any_target_is_zero_and_trains_nothing(checkpoint, hidden):
    last = load_output_blocks(checkpoint, CUT, dtype=F32)
    entered = hidden.clone().requires_grad_()
    loss = last.loss(entered, LENGTHS, torch.full((TOKENS,), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert entered.grad.abs().sum() == 0


def test_last_logits_are_the_last_rows(checkpoint, hidden):
    last = load_output_blocks(checkpoint, CUT, dtype=F32)
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    torch.testing.assert_close(last.last_logits(hidden, LENGTHS), last(hidden, LENGTHS)[ends])


def test_gradients_of_a_group_stay_with_their_member(checkpoint, hidden):
    trunk = load_trunk(checkpoint, BlockRange(0, 5), dtype=F32)
    ranges = (BlockRange(0, 3), BlockRange(2, 5), BlockRange(1, 4))
    entered = [hidden.clone().requires_grad_() for _ in ranges]
    left = trunk.forward_group([TrunkPart(h, LENGTHS, r) for h, r in zip(entered, ranges, strict=True)])
    for out, blocks in zip(left, ranges, strict=True):
        torch.testing.assert_close(out, trunk(hidden, LENGTHS, blocks))
    torch.autograd.backward(left[1], torch.ones_like(left[1]), retain_graph=True)
    assert entered[1].grad.norm() > 0
    assert all(h.grad is None or h.grad.norm() == 0 for h in (entered[0], entered[2]))


def test_members_that_share_no_block_run_apart(checkpoint, hidden):
    trunk = load_trunk(checkpoint, BlockRange(0, 5), dtype=F32)
    ranges = (BlockRange(0, 1), BlockRange(3, 5))
    left = trunk.forward_group([TrunkPart(hidden, LENGTHS, r) for r in ranges])
    for out, blocks in zip(left, ranges, strict=True):
        torch.testing.assert_close(out, load_trunk(checkpoint, blocks, dtype=F32)(hidden, LENGTHS))


def test_adapters_injected_later_act_in_every_stage(checkpoint, hidden):
    trunk = load_trunk(checkpoint, RANGE, dtype=F32)
    inner = BlockRange(2, 3)
    before = trunk(hidden, LENGTHS, inner)
    num_parameters = trunk.num_parameters
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), trunk.model)
    after = trunk(hidden, LENGTHS, inner)
    assert not torch.allclose(before, after)
    assert trunk.num_parameters == num_parameters + 3 * 2 * (32 + 32)
    after.sum().backward()
    assert {name.split(".")[2] for name in gradients(trunk)} == {"2"}


def test_misfits_are_refused(checkpoint, hidden, targets):
    trunk, last = load_trunk(checkpoint, RANGE, dtype=F32), load_output_blocks(checkpoint, CUT, dtype=F32)
    with pytest.raises(ConfigError, match="19 tokens were announced"):
        trunk(hidden[:-1], LENGTHS)
    with pytest.raises(ConfigError, match="at least one token"):
        trunk(hidden, (*LENGTHS, 0))
    with pytest.raises(ConfigError, match="Blocks 0:2 were asked of a trunk that has 1:4"):
        trunk(hidden, LENGTHS, BlockRange(0, 2))
    with pytest.raises(ConfigError, match="18 targets for 19 rows"):
        last.loss(hidden, LENGTHS, targets[:-1])
    with pytest.raises(ConfigError, match="at least one member"):
        trunk.forward_group([])
