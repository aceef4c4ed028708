"""The model of an attacker who was sent what a client trained: the server's, under `sync = "step"` and `"round"`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedsea.audit.attacker import BaseModel, Part
from fedsea.audit.subject import Subject
from fedsea.model import adapters


class SentModel(BaseModel):
    """The public model with the client's trained parameters in its input and output blocks, and the trunk's in it.

    Args:
        subject: Its `sent` are loaded; a segment of which it has none stays as the public weights have it.
        device: Where the attacks run.
    """

    def __init__(self, subject: Subject, device: str = "cpu") -> None:
        super().__init__(subject.checkpoint, subject.partition, device)
        self._plan, self._sent = subject.plan, subject.sent

    def _load(self, load: Callable[..., Part], where: object) -> Part:
        segment = super()._load(load, where)
        settings = self._plan.adapter
        with torch.inference_mode(False):
            adapters.attach(segment, settings, getattr(settings, segment.kind.value), self._plan.seed)
            names = adapters.trainable(segment).keys()
            if names <= self._sent.keys():
                adapters.load(segment, {name: self._sent[name] for name in names})
        segment.model.requires_grad_(False).eval()
        return segment


def model_of(subject: Subject, device: str = "cpu") -> BaseModel:
    """The best that the server has: what was sent to it, or else the public weights."""
    return SentModel(subject, device) if subject.sent else BaseModel(subject.checkpoint, subject.partition, device)
