"""A message whose payload is arriving: every byte is copied once, to where it belongs."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch

from fedsea.errors import ProtocolError
from fedsea.tensors import all_finite
from fedsea.wire.buffers import BufferPool
from fedsea.wire.checks import place
from fedsea.wire.codecs import CODECS, IN_PLACE, WORDS
from fedsea.wire.errors import NonFiniteMessage
from fedsea.wire.frames import Frame, TensorSpec
from fedsea.wire.messages import Message


class Assembly:
    """One message whose payload is arriving.

    fp32 tensors and words are filled in place; the others go through `staging`, which the next message uses again.
    """

    def __init__(self, frame: Frame, pool: BufferPool, staging: np.ndarray) -> None:
        self.frame = frame
        self.missing = frame.payload_bytes
        self.tensors = [_memory(pool, spec) for spec in frame.specs]
        self.raw: list[np.ndarray] = []
        start = 0
        for spec, tensor in zip(frame.specs, self.tensors, strict=True):
            if spec.codec in IN_PLACE:
                self.raw.append(tensor.view(-1).view(torch.uint8).numpy())
            else:
                self.raw.append(staging[start : start + spec.wire_bytes])
                start += spec.wire_bytes
        if frame.kind.name == "Welcome":
            self.raw.append(np.empty(frame.payload_bytes, dtype=np.uint8))
        self._views = [raw.data for raw in self.raw]
        self._index = self._filled = 0

    def fill(self, chunk: memoryview) -> None:
        """Copy the next piece of payload to where it belongs."""
        self.missing -= len(chunk)
        start = 0
        while start < len(chunk):
            view = self._views[self._index]
            num_bytes = min(len(view) - self._filled, len(chunk) - start)
            view[self._filled : self._filled + num_bytes] = chunk[start : start + num_bytes]
            start += num_bytes
            self._filled += num_bytes
            if self._filled == len(view):
                self._index, self._filled = self._index + 1, 0

    def message(self) -> Message:
        """The decoded message; its tensors are checked to be finite."""
        frame, fields = self.frame, dict(self.frame.fields)
        for spec, tensor, raw in zip(frame.specs, self.tensors, self.raw, strict=False):
            if spec.codec not in IN_PLACE:
                CODECS[spec.codec].decode(torch.from_numpy(raw), tensor)
            if tensor.is_floating_point() and not all_finite(tensor):
                raise NonFiniteMessage(
                    f"A {frame.kind.name} held a NaN or an infinity and was dropped; the peer's model or data produced "
                    "it: lower the learning rate, or look at that side's log.",
                    frame.kind.name,
                    **place(fields),
                )
        if frame.kind.channel is not None:
            tensors = {spec.name: tensor for spec, tensor in zip(frame.specs, self.tensors, strict=True)}
            if frame.kind.second is not None:
                fields["gradient"] = {"": tensors.pop("gradient")}
            fields["tensors"] = tensors
        if frame.kind.name == "Welcome":
            try:
                fields["plan_json"] = self.raw[0].tobytes().decode()
            except UnicodeDecodeError:
                raise ProtocolError("The plan that the server sent is not text.") from None
        return cast(Message, frame.kind.cls(**fields))


def _memory(pool: BufferPool, spec: TensorSpec) -> torch.Tensor:
    if spec.codec != WORDS:
        return pool.empty(spec.shape)
    return pool.empty((2 * math.prod(spec.shape),)).view(torch.int64).view(spec.shape)


class Discarded:
    """A message whose header had a non-finite number: its payload is read past, then the error is raised."""

    def __init__(self, frame: Frame, error: NonFiniteMessage) -> None:
        self.missing, self._error = frame.payload_bytes, error

    def fill(self, chunk: memoryview) -> None:
        """Read past the next piece."""
        self.missing -= len(chunk)

    def message(self) -> Message:
        """Raise what was wrong with the header."""
        raise self._error
