"""Tokens from the gradient of a client's parameters: the mathematics of attack A7 (DAGER, arXiv 2405.15586).

The gradient of a linear layer's weight, or of its LoRA factor A, is a sum over tokens of something times the layer's
input: its rows lie in the span of these inputs. Behind the embedding and a norm, a token's input is the same wherever
it stands, so the attacker holds every token of the vocabulary against that span. Layers that read the same input
count together. With as many rows as distinct tokens, or more, the answer is exact; with fewer, no token lies in the
span, and a greedy search for a sparse explanation is what is left.

V  vocabulary size, D  width of a layer's input, R  rows of all gradients of one input
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedsea.model.segments import InputBlocks

_SAME = 1e-6
_IN_SPAN = 1e-4
"""Largest squared share of a token's input outside the span, for a gradient that arrived without noise."""

_RANK = 1e-5
"""Singular values below this share of the largest are rounding."""

_FULL = ".weight"
_FACTOR = ".lora_A.weight"


@dataclass(frozen=True, slots=True)
class SpanFindings:
    """What the gradients of one update say about the tokens behind them.

    Attributes:
        found: Ids, the surest first.
        rank: Of the gradients' rows that could be used.
        rows: How many rows there are.
        method: "embedding" (rows of the embedding that have a gradient), "span", "sparse", or "" where the update holds
            nothing that could be used.
        conclusive: Whether the attacker knows that the answer is exact.
    """

    found: tuple[int, ...]
    rank: int
    rows: int
    method: str
    conclusive: bool


NOTHING = SpanFindings((), 0, 0, "", False)


def token_inputs(input_blocks: InputBlocks, vocab_size: int, chunk: int = 8192) -> dict[str, torch.Tensor]:
    """Inputs of the first block's linear layers that depend on nothing but the token.

    Args:
        input_blocks: The public ones, with at least one block.
        vocab_size: V.
        chunk: Tokens that run at once.

    Returns:
        Module's name to inputs [V, D].
    """
    first = next(iter(input_blocks.blocks), None)
    if first is None:
        return {}
    modules = {n: m for n, m in input_blocks.model.named_modules() if isinstance(m, nn.Linear) and f".{first}." in n}

    def inputs(ids_T: torch.Tensor, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, args: seen.__setitem__(name, args[0].detach().float().flatten(0, -2))

        handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
        try:
            with torch.no_grad():
                input_blocks(ids_T, lengths)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    # The same token behind two other ones: what differs depends on more than the token.
    probe = inputs(torch.tensor([0, 2, 1, 2]), (2, 2))
    alike = [n for n, rows in probe.items() if (rows[1] - rows[3]).norm() <= _SAME * rows[1].norm()]
    parts = [inputs(ids_T, (1,) * len(ids_T)) for ids_T in torch.split(torch.arange(vocab_size), chunk)]
    return {name: torch.cat([part[name] for part in parts]) for name in alike}


def invert(
    gradients: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], most_sparse: int = 256
) -> SpanFindings:
    """Tokens behind the gradients of a client's parameters (or behind the sum of several clients').

    Args:
        gradients: As the server received them, by portable name.
        inputs: See `token_inputs`.
        most_sparse: Tokens after which the greedy search ends.
    """
    if (found := _embedding_rows(gradients)) is not None:
        return found
    groups = _groups(gradients, inputs)
    if not groups:
        return NOTHING
    rows_RD, tokens_VD = max(groups, key=lambda group: group[0].shape[0])
    norm = rows_RD.norm(dim=1, keepdim=True)
    rows_RD = (rows_RD / norm.clamp_min(1e-30))[norm.squeeze(1) > 0].double()
    if not len(rows_RD):
        return NOTHING
    _, singular, basis = torch.linalg.svd(rows_RD, full_matrices=False)
    rank = int((singular > _RANK * singular[0]).sum())
    units_VD = nn.functional.normalize(tokens_VD.double(), dim=1)
    if rank < tokens_VD.shape[1]:
        outside_V = 1.0 - (units_VD @ basis[:rank].T).square().sum(1)
        inside = (outside_V < _IN_SPAN).nonzero().squeeze(1)
        if len(inside):
            order = outside_V[inside].argsort()
            exact = len(inside) <= rank  # more than the rank: some lie there by chance
            return SpanFindings(tuple(inside[order].tolist()), rank, len(rows_RD), "span", exact)
    weighted_RD = singular[:rank, None] * basis[:rank]
    found_ids, explained = _sparse(weighted_RD, units_VD, min(most_sparse, tokens_VD.shape[1] - 1))
    return SpanFindings(found_ids, rank, len(rows_RD), "sparse", explained)


def _embedding_rows(gradients: Mapping[str, torch.Tensor]) -> SpanFindings | None:
    """A gradient of the embedding has rows at the tokens of the text alone, if the head has a weight of its own."""
    for name, gradient in gradients.items():
        if gradient.dim() == 2 and name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
            size_V = gradient.float().norm(dim=1)
            used = size_V > 1e-12 * size_V.max().clamp_min(1e-30)
            if not 0 < int(used.sum()) < len(size_V):
                return None
            order = size_V.masked_fill(~used, -1.0).argsort(descending=True)[: int(used.sum())]
            return SpanFindings(tuple(order.tolist()), int(used.sum()), len(size_V), "embedding", True)
    return None


def _groups(
    gradients: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients whose layers read the same input, as rows [R, D], with that input of every token."""
    groups: list[tuple[list[torch.Tensor], torch.Tensor]] = []
    for module, tokens_VD in inputs.items():
        rows = gradients.get(module + _FACTOR, gradients.get(module + _FULL))
        if rows is None or rows.shape[1] != tokens_VD.shape[1]:
            continue
        for members, shared_VD in groups:
            if shared_VD.shape == tokens_VD.shape and (shared_VD - tokens_VD).norm() <= _SAME * shared_VD.norm():
                members.append(rows.float())
                break
        else:
            groups.append(([rows.float()], tokens_VD))
    return [(torch.cat(members), tokens_VD) for members, tokens_VD in groups]


def _sparse(rows_RD: torch.Tensor, units_VD: torch.Tensor, most: int) -> tuple[tuple[int, ...], bool]:
    """Simultaneous orthogonal matching pursuit: few tokens whose inputs explain all rows together."""
    total, left_RD = float(rows_RD.norm()), rows_RD
    chosen: list[int] = []
    basis_KD = rows_RD.new_zeros(0, rows_RD.shape[1])
    for _ in range(most):
        gain_V = (units_VD @ left_RD.T).square().sum(1)
        gain_V[chosen] = -1.0
        best = int(gain_V.argmax())
        new_D = units_VD[best] - basis_KD.T @ (basis_KD @ units_VD[best])
        new_D = new_D - basis_KD.T @ (basis_KD @ new_D)
        if float(new_D.norm()) < 1e-9:
            break
        chosen.append(best)
        basis_KD = torch.cat([basis_KD, (new_D / new_D.norm())[None]])
        left_RD = rows_RD - (rows_RD @ basis_KD.T) @ basis_KD
        if float(left_RD.norm()) < 1e-4 * total:
            return tuple(chosen), len(chosen) < rows_RD.shape[1] // 2
    return tuple(chosen), False
