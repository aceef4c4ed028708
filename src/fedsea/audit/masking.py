"""Two small rounds of secure aggregation with the real members and aggregator: whether every mask is used once.

The parameters have the plan's names and holders, cut to a few values each; the same values are summed in both rounds,
so that a mask which comes again shows at once.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import replace

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedsea.audit.verdict import Finding, Verdict
from fedsea.client.secure import layout_of
from fedsea.errors import AuthError, FedseaError
from fedsea.federation.secure import Aggregator, Layout, Member, Phase, Setting, Transcript, check_fresh
from fedsea.federation.secure.messages import Notary
from fedsea.model.checkpoint import Checkpoint
from fedsea.plan import FederationPlan

MakeMember = Callable[[Setting, str, Notary], Member]

_ROUNDS = 2
_MOST_VALUES = 64
"""Of each parameter; a mask that comes again shows in so many words together."""


class _Notary:
    """Signs with a key of this process: the certificate is the public key behind the name."""

    def __init__(self, name: str) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.certificate = name.encode() + b"\0" + self._key.public_key().public_bytes_raw()

    def name(self, certificate: bytes) -> str:
        name, mark, _ = certificate[:-32].rpartition(b"\0")
        if not mark:
            raise AuthError("This is no certificate of the audit's own secure rounds.")
        return name.decode()

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement)

    def verify(self, certificate: bytes, statement: bytes, signature: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(certificate[-32:]).verify(signature, statement)
        except InvalidSignature:
            return False
        return True


def check_masks(plan: FederationPlan, checkpoint: Checkpoint, make: MakeMember = Member) -> list[Finding]:
    """What is wrong with the masks of a plan's secure aggregation, found by looking at what its server receives.

    Args:
        plan: With all of its clients.
        checkpoint: For the names of what is trained.
        make: In the place of the real member: a fault that is planted.
    """
    layout = _small(layout_of(plan, checkpoint))
    run_id = hashlib.sha256(secrets.token_bytes(16)).hexdigest()[:16]
    notaries = {name: _Notary(name) for name in plan.client_names}
    transcripts: list[Transcript] = []
    try:
        for number in range(_ROUNDS):
            transcripts += _round(Setting.of(plan, run_id, number, 1, layout), notaries, make)
    except FedseaError as error:
        return [Finding(Verdict.BROKEN, f"Secure aggregation did not get through two rounds: {error.message}")]
    return [
        Finding(
            Verdict.BROKEN,
            f"Secure aggregation, {found.kind} (client {', '.join(found.clients)}): {found.detail} The server can take "
            "such masks off; use no secure aggregation with this version of fedsea.",
        )
        for found in check_fresh(transcripts)
    ]


def _small(layout: Layout) -> Layout:
    groups = []
    for group in layout.groups:
        sizes = {name: torch.Size(shape).numel() for name, shape in group.shapes.items()}
        groups.append(replace(group, shapes={name: (min(_MOST_VALUES, size),) for name, size in sizes.items()}))
    return Layout(tuple(groups))


def _round(setting: Setting, notaries: dict[str, _Notary], make: MakeMember) -> list[Transcript]:
    """One attempt from keys to masked words, as the server has it, and its sum."""
    names = setting.clients
    server = Aggregator(setting, names, notaries[names[0]])
    members = {name: make(setting, name, notaries[name]) for name in names}
    keys = {name: member.advertise() for name, member in members.items()}
    for ad in keys.values():
        server.add_keys(ad)
    server.proceed()
    for name, member in members.items():
        server.add_shares(name, member.share(tuple(server.roster.values())))
    server.proceed()
    transcripts = []
    for name, member in members.items():
        member.receive(server.delivery(name))
        words = setting.layout.to_tensors(member.mask(_values(setting.layout, name), 1))
        server.accumulate(name, words)
        server.add_masked(name)
        transcripts.append(Transcript(name, setting.round, setting.attempt, keys[name], words))
    assert server.phase is Phase.MASKED
    return transcripts


def _values(layout: Layout, name: str) -> dict[str, torch.Tensor]:
    """As small as trained adapters are, and the same in every round."""
    draw = torch.Generator().manual_seed(0)
    groups = [layout.groups[index] for index in layout.of_client(name)]
    return {key: 0.02 * torch.randn(shape, generator=draw) for group in groups for key, shape in group.shapes.items()}
