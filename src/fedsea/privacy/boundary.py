"""The only exit: every tensor that leaves a client is a `Release` made here.

With trust mode `trusted-server` the boundary checks and passes values on unchanged: the server can reconstruct
the text from them. Clipping, noise and the ledger of the other modes belong here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedsea.errors import NonFiniteError
from fedsea.tensors import all_finite
from fedsea.types import Channel, Release

STATEMENTS = {
    "trusted-server": (
        "Trust mode: trusted-server. Text stays here and the connection is encrypted, but the server CAN reconstruct "
        "the text from the hidden states and gradients that it receives. Use it only with a server you trust."
    ),
}
"""Trust mode to the sentence that is said at every start."""


class Boundary:
    """Makes releases for one client under one trust mode.

    Args:
        trust_mode: A key of `STATEMENTS`.
    """

    def __init__(self, trust_mode: str) -> None:
        self.statement = STATEMENTS[trust_mode]

    def hidden(self, hidden_TH: torch.Tensor) -> Release:
        """Release hidden states at the trunk's input.

        Raises:
            NonFiniteError: A value is NaN or infinite.
        """
        return self._release({"": hidden_TH}, Channel.HIDDEN)

    def gradient(self, gradient_TH: torch.Tensor) -> Release:
        """Release the gradient of the summed loss at the trunk's output.

        Raises:
            NonFiniteError: A value is NaN or infinite.
        """
        return self._release({"": gradient_TH}, Channel.GRADIENT)

    def update(self, tensors: Mapping[str, torch.Tensor]) -> Release:
        """Release trained parameters, or their gradients, by name.

        Raises:
            NonFiniteError: A value is NaN or infinite.
        """
        return self._release(tensors, Channel.UPDATE)

    def _release(self, tensors: Mapping[str, torch.Tensor], channel: Channel) -> Release:
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        for name, tensor in detached.items():
            if not all_finite(tensor):
                what = f"parameter {name}" if name else f"{channel} values"
                raise NonFiniteError(
                    f"The {what} about to leave this client are not finite: nothing was sent and the step was not "
                    "applied. Lower the learning rate, check this silo's data, or use bf16 or fp32 instead of fp16."
                )
        return Release(detached, channel)
