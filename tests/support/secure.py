"""Members and a server of secure aggregation in one process, with notaries that need no certificates."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from fedsea.errors import AuthError
from fedsea.federation.secure import Aggregator, FixedPoint, Layout, Member, Phase, Setting

SHAPES: dict[str, tuple[int, ...]] = {"block.A": (6, 10), "block.B": (10, 6), "norm": (7,)}


class Registry:
    """The authority: a key for every certificate."""

    def __init__(self) -> None:
        self.keys: dict[bytes, bytes] = {}

    def enrol(self, name: str) -> FakeNotary:
        certificate = f"certificate of {name} ".encode() + secrets.token_bytes(64)
        self.keys[certificate] = secrets.token_bytes(32)
        return FakeNotary(self, certificate)


@dataclass(frozen=True)
class FakeNotary:
    """Signs with a key that its registry knows."""

    registry: Registry
    certificate: bytes

    def name(self, certificate: bytes) -> str:
        if certificate not in self.registry.keys:
            raise AuthError("not of this authority")
        return certificate.split()[2].decode()

    def sign(self, statement: bytes) -> bytes:
        return hmac.digest(self.registry.keys[self.certificate], statement, "sha256")

    def verify(self, certificate: bytes, statement: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(hmac.digest(self.registry.keys[certificate], statement, "sha256"), signature)


@dataclass
class Cast:
    """Everybody of one attempt, their values and weights."""

    names: tuple[str, ...]
    setting: Setting
    members: dict[str, Member]
    aggregator: Aggregator
    registry: Registry
    values: dict[str, dict[str, torch.Tensor]]
    weights: dict[str, int]
    sent: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def advertise(self, names: Collection[str] | None = None) -> None:
        for name in self.names if names is None else names:
            self.aggregator.add_keys(self.members[name].advertise())

    @property
    def roster(self):
        return tuple(self.aggregator.roster.values())

    def share(self, names: Collection[str] | None = None) -> None:
        for name in self.aggregator.waiting_for() if names is None else names:
            self.aggregator.add_shares(name, self.members[name].share(self.roster))

    def mask(self, names: Collection[str] | None = None) -> None:
        for name in self.aggregator.waiting_for() if names is None else names:
            member = self.members[name]
            member.receive(self.aggregator.delivery(name))
            words = member.mask(self.values[name], self.weights[name])
            self.sent[name] = self.setting.layout.to_tensors(words)
            self.aggregator.accumulate(name, self.sent[name])
            self.aggregator.add_masked(name)

    def consent(self) -> None:
        for name in self.aggregator.waiting_for():
            self.aggregator.add_consent(name, self.members[name].consent(self.aggregator.survivors))

    def reveal(self) -> None:
        for name in self.aggregator.waiting_for():
            self.aggregator.add_reveal(name, self.members[name].reveal(self.aggregator.signatures))

    def play(self, lost: Mapping[str, Phase] | None = None, until: Phase = Phase.DONE) -> None:
        """From phase to phase; who is lost in a phase does not send what it awaits."""
        steps = {
            Phase.KEYS: self.advertise,
            Phase.SHARES: self.share,
            Phase.MASKED: self.mask,
            Phase.CONSENT: self.consent,
            Phase.REVEAL: self.reveal,
        }
        while self.aggregator.phase < until:
            phase = self.aggregator.phase
            gone = [name for name, when in (lost or {}).items() if when is phase]
            for name in gone:
                self.aggregator.drop(name)
            steps[phase](*([[n for n in self.names if n not in gone]] if phase is Phase.KEYS else []))
            self.aggregator.proceed()

    def plain_mean(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        means = {}
        for key in {key for name in names for key in self.values[name]}:
            holders = [name for name in names if key in self.values[name]]
            total = sum(self.weights[name] for name in holders)
            means[key] = sum(self.values[name][key].double() * (self.weights[name] / total) for name in holders)
        return means


def make_cast(
    count: int = 5,
    *,
    threshold: int = 0,
    least: int = 2,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None,
    registry: Registry | None = None,
    attempt: int = 1,
    seed: int = 0,
    most_weight: int = 5000,
) -> Cast:
    """Members `c0`, `c1`, … with random values and weights."""
    names = tuple(f"c{index}" for index in range(count))
    held = {name: dict(SHAPES if shapes is None or name not in shapes else shapes[name]) for name in names}
    layout = Layout.of(held)
    numbers = FixedPoint.of(count, most_weight)
    place = ("run-1", "ab" * 32, 3, attempt)
    setting = Setting(*place, names, threshold or 2 * count // 3 + 1, least, layout, numbers)
    registry = registry or Registry()
    notaries = {name: registry.enrol(name) for name in names}
    generator = torch.Generator().manual_seed(seed)
    values = {name: {k: torch.randn(s, generator=generator) for k, s in held[name].items()} for name in names}
    weights = {name: int(torch.randint(1, most_weight + 1, (), generator=generator)) for name in names}
    members = {name: Member(setting, name, notaries[name]) for name in names}
    aggregator = Aggregator(setting, names, notaries[names[0]])
    return Cast(names, setting, members, aggregator, registry, values, weights)
