"""The attacks by their ids, in the order in which an audit runs them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from fedsea.types import Channel

Answers = Literal["text", "own"]
Needs = Literal["", "known", "public"]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        id: As users name it.
        title: A few words.
        channel: What it looks at.
        module: Of `audit.attacks`; its `run(attacker, targets, progress)` is the attack.
        answers: "text": a list of `Recovered`; "own": an `OwnResult`.
        needs_more: Adds nothing where a simpler forward attack has recovered the text already.
        share: Of the attacks' time that is left when it begins; a slow one must not keep others from running.
        always: Runs even when the time is up: without it the audit would say nothing. It does then what it cannot do
            without, whatever that takes.
        needs: Texts that the attacker has beside what it attacks: "known" ones, of which it saw what was sent, or
            "public" ones. They are made when the first attack that needs them runs.
        in_use: Looks at sessions alone; nothing like it is in training.
        learns: Trains a model of its own: when the time is up it has not learned all that it can.
    """

    id: str
    title: str
    channel: Channel
    module: str
    answers: Answers = "text"
    needs_more: bool = False
    share: float = 0.5
    always: bool = False
    needs: Needs = ""
    in_use: bool = False
    learns: bool = False

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(f"fedsea.audit.attacks.{self.module}")


ATTACKS: tuple[Attack, ...] = (
    Attack("A0", "the public model's guesses", Channel.HIDDEN, "a0_prior", always=True),
    Attack("A1", "nearest hidden state over the vocabulary", Channel.HIDDEN, "a1_nearest", always=True),
    Attack("A10", "answers from the server's own outputs", Channel.HIDDEN, "a10_answers", always=True, in_use=True),
    Attack("A5", "labels from gradients", Channel.GRADIENT, "a5_labels", share=0.7, always=True),
    Attack("A7", "inversion of an update", Channel.UPDATE, "a7_update", "own", needs="public"),
    Attack("A9", "test of the noise mechanism", Channel.HIDDEN, "a9_mechanism", "own", share=0.5),
    Attack(
        "A8",
        "membership and canaries in the shared adapter",
        Channel.UPDATE,
        "a8_membership",
        "own",
        share=0.25,
        needs="public",
    ),
    Attack("A2", "likelihood and prior, beam search", Channel.HIDDEN, "a2_likelihood", needs_more=True),
    Attack("A4", "average over epochs, then A2", Channel.HIDDEN, "a4_averaging", needs_more=True),
    Attack("A6", "alignment by known texts, then A2", Channel.HIDDEN, "a6_alignment", needs_more=True, needs="known"),
    Attack(
        "A3",
        "learned inverter",
        Channel.HIDDEN,
        "a3_inverter",
        needs_more=True,
        share=0.3,
        needs="public",
        learns=True,
    ),
)
"""In order: what is quick and decisive first, so that a short time is spent on what matters."""

IDS = tuple(attack.id for attack in ATTACKS)
