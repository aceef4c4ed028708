"""What a CUDA device computes is what the CPU computes, and a server on one serves clients without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsea.client.setup import load_segments
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import trainable_trunk
from fedsea.plan import FederationPlan, parse_plan
from fedsea.types import IGNORE, BlockRange, TokenBatch
from tests.support.assets import HIDDEN

DEVICE = "cuda"
LENGTHS = (7, 3, 12)
BLOCKS = BlockRange(1, 4)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
]


def plan_for(base_model: Path, **model: str) -> FederationPlan:
    return parse_plan({"model": {"path": str(base_model), **model}, "clients": [{"name": "a"}]})


def random_rows(seed: int) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), HIDDEN, generator=torch.Generator().manual_seed(seed))


def batch() -> TokenBatch:
    ids = torch.randint(4, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    targets = ids.roll(-1)
    targets[torch.tensor(LENGTHS).cumsum(0) - 1] = IGNORE
    return TokenBatch(ids, targets, LENGTHS)


def run_trunk(plan: FederationPlan, device: str) -> dict[str, torch.Tensor]:
    """Output, gradient at the input, and gradients of the adapters, on the CPU in float32."""
    trunk = trainable_trunk(plan, open_checkpoint(plan.model.path), BLOCKS, device)
    hidden = random_rows(1).to(device).requires_grad_()
    output = trunk(hidden, LENGTHS)
    output.backward(random_rows(2).to(output))
    found = {"output": output.detach(), "gradient": hidden.grad}
    found |= {name: p.grad for name, p in trunk.model.named_parameters() if p.grad is not None}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def run_ends(plan: FederationPlan, device: str) -> dict[str, torch.Tensor]:
    """Hidden states at the cut, loss, its gradient, and gradients of the adapters, on the CPU in float32."""
    segments = load_segments(plan, open_checkpoint(plan.model.path), "a", device)
    hidden = segments.embed(batch(), 0, 0)
    loss, gradient = segments.head(batch(), hidden.detach(), 0, 0)
    hidden.backward(gradient.to(hidden))
    found = {"hidden": hidden.detach(), "loss": torch.tensor(loss), "gradient": gradient, **segments.gradients()}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("run", [run_trunk, run_ends], ids=["trunk", "client"])
def test_segments_on_the_gpu_give_in_fp32_what_the_cpu_gives(base_model, run):
    plan = plan_for(base_model)
    expected, found = run(plan, "cpu"), run(plan, DEVICE)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) or 1.0
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("model", [{"dtype": "bfloat16"}, {"autocast": "bfloat16"}], ids=["weights", "autocast"])
@pytest.mark.parametrize("run", [run_trunk, run_ends], ids=["trunk", "client"])
def test_bf16_on_the_gpu_is_near_to_fp32(base_model, run, model):
    expected, found = run(plan_for(base_model), "cpu"), run(plan_for(base_model, **model), DEVICE)
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
    for name in expected.keys() - {"loss"}:
        if expected[name].any():  # a factor whose twin is still zero has no gradient
            nearness = torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0)
            assert nearness > 0.99, name


def test_a_server_on_the_gpu_trains_with_clients_on_the_cpu(federation):
    on_cpu, on_gpu = federation("a", "b"), federation("a", "b")
    expected = on_cpu.train(evaluate=True)
    server = on_gpu.start_server(device=DEVICE)
    parts = {name: on_gpu.start_client(name, evaluate=True) for name in on_gpu.names}
    for part in (*parts.values(), server):
        part.finish()
    for name, part in parts.items():
        assert part.result.next_step == 6
        assert part.result.loss_after < part.result.loss_before
        assert part.result.loss_after == pytest.approx(expected[name].result.loss_after, rel=1e-2)
