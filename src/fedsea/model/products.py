"""Products with frozen weights for a few rows at a time, where what counts is how fast the weights are read.

For one row the BLAS behind `F.linear` reads a weight that does not fit into the core's own cache with half of the
memory's bandwidth, and for 2 to 32 rows it reaches half of the core's speed. oneDNN does better at both where there is
AVX-512: for one row on the weight as it is, for more on a copy of it in its own order. With AVX2 alone, one row through
a wide weight is fastest on a transposed copy (a vocabulary of 32,000 and 288 columns: 16 GB/s against 7), and so are
several rows through a weight that fits into the core's cache (16 rows through the layers of a block of 288 columns:
564 µs, 652 in oneDNN's order and 638 as it is).

    T  rows, H  inputs, O  outputs
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

_OWN_CACHE_BYTES = 2 << 20
"""Weights below this are read from the core's cache or near it, where `F.linear` is as good for one row."""
_PACKED_FOR_ROWS = 16
MOST_COPIED_BYTES = 2 << 30
"""All copies of a process take no more: beyond it the memory is worth more than the speed."""


@functools.cache
def _onednn() -> Callable[..., Any] | None:
    """OneDNN's product (as torch's compiler calls it), or None where torch has none or it does not give the values."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        with torch.inference_mode(False), torch.no_grad():
            x_TH, weight_OH = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
            product: Callable[..., Any] = torch.ops.mkldnn._linear_pointwise
            packed = torch.ops.mkldnn._reorder_linear_weight(weight_OH, 2)
            wanted_TO = F.linear(x_TH, weight_OH)
            found = [product(x_TH, weight, None, "none", [], "") for weight in (weight_OH, packed)]
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    good = all(torch.allclose(found_TO, wanted_TO) for found_TO in found)
    return product if good else None


@functools.cache
def _likes_columns() -> bool:
    """By the kind of processor and not by a clock: the same machine always gives the same values."""
    return "AVX512" not in torch.backends.cpu.get_cpu_capability()


class Product:
    """x Wᵀ + b.

    Args:
        weight_OH: Read at every call; copies of it are made anew when its parameters say that it has changed.
        bias_O: Or None.
        parameters: Whose values the weight is.
    """

    def __init__(
        self, weight_OH: torch.Tensor, bias_O: torch.Tensor | None, parameters: Sequence[torch.Tensor] = ()
    ) -> None:
        self.weight_OH = weight_OH
        self.bias_O = bias_O
        self._parameters = parameters
        self._versions: list[int] = []
        served = weight_OH.device.type == "cpu" and weight_OH.dtype is torch.float32
        self._product: Callable[..., Any] | None = _onednn() if served else None
        self._streams = weight_OH.numel() * weight_OH.element_size() > _OWN_CACHE_BYTES
        self._is_wide = self._streams and 2 * weight_OH.shape[0] >= 3 * weight_OH.shape[1]
        self._in_columns = not self._streams and _likes_columns()  # for several rows
        self._packed: torch.Tensor | None = None
        self._transposed_HO: torch.Tensor | None = None

    @property
    def most_copied_bytes(self) -> int:
        """What its copies may take together."""
        if self._product is None:
            return 0
        return self.weight_OH.numel() * self.weight_OH.element_size() * (2 if self._is_wide and _likes_columns() else 1)

    def prepare(self, rows: int) -> None:
        """Have a copy for so many rows, where one is of use; none of a weight that is trained, which would leave it."""
        if self._product is None:
            return
        versions = [parameter._version for parameter in self._parameters]
        trained = any(parameter.requires_grad for parameter in self._parameters)
        if trained or versions != self._versions:
            self._packed = self._transposed_HO = None
            self._versions = versions
        if trained:
            return
        wants_columns = self._in_columns if rows > 1 else self._is_wide and _likes_columns()
        if wants_columns and self._transposed_HO is None:
            with torch.inference_mode(False), torch.no_grad():
                self._transposed_HO = self.weight_OH.t().contiguous()
        elif rows > 1 and not wants_columns and self._packed is None:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight_OH, _PACKED_FOR_ROWS)

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Rows [T, O]."""
        weight_OH, single = self._packed, x_TH.shape[0] == 1
        # The same values whatever else has run before: a copy made for several rows does not serve one.
        if self._transposed_HO is not None and single != self._in_columns:
            return F.linear(x_TH, self._transposed_HO.t(), self.bias_O)
        if single:
            weight_OH = self.weight_OH if self._streams and not _likes_columns() else None
        if weight_OH is None or self._product is None:
            return F.linear(x_TH, self.weight_OH, self.bias_O)
        out_TO: torch.Tensor = self._product(x_TH, weight_OH, self.bias_O, "none", [], "")
        return out_TO


class Copies:
    """The copies that one owner of weights may have beside those of the process' other owners: all, or none.

    Args:
        products: Of its weights; their copies are made by `prepare` alone, and only where there is `room`.
    """

    _lock: ClassVar = threading.Lock()
    _of_the_process: ClassVar[weakref.WeakSet[Copies]] = weakref.WeakSet()

    def __init__(self, products: Iterable[Product]) -> None:
        self._num_bytes = sum(product.most_copied_bytes for product in products)
        self._granted = False

    def room(self) -> bool:
        """Whether there is room; once there is, it stays this owner's as long as that lives."""
        if not self._granted and self._num_bytes:
            with self._lock:
                others = sum(other._num_bytes for other in self._of_the_process if other is not self)
                if others + self._num_bytes <= MOST_COPIED_BYTES:
                    self._of_the_process.add(self)
                    self._granted = True
        return self._granted


def most_copied_bytes(owned_bytes: Iterable[int]) -> int:
    """What copies may take in a process on this machine's CPU.

    Args:
        owned_bytes: Of the float32 weights of each owner.
    """
    if _onednn() is None:
        return 0
    copied = [(2 if _likes_columns() else 1) * owned for owned in owned_bytes]
    return min(MOST_COPIED_BYTES, sum(one for one in copied if one <= MOST_COPIED_BYTES))


class FrozenLinear(nn.Module):
    """A linear layer that is not trained, for a few rows at a time.

    Args:
        linear: Keeps its weight, which this one uses.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias_O = None if linear.bias is None else linear.bias.data
        self.product = Product(linear.weight.data, bias_O, [linear.weight])
        self._copies = Copies([self.product])

    @staticmethod
    def serves(linear: nn.Module | None) -> bool:
        """Whether there is such a form of a layer."""
        return type(linear) is nn.Linear and not linear.weight.requires_grad

    def is_of(self, linear: nn.Linear) -> bool:
        """Whether this still is the layer's product."""
        return self.product.weight_OH.data_ptr() == linear.weight.data_ptr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer."""
        rows_TH = x.reshape(-1, x.shape[-1])
        if self._copies.room():
            self.product.prepare(len(rows_TH))
        return self.product(rows_TH).view(*x.shape[:-1], self.product.weight_OH.shape[0])
