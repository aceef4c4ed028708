"""Small rounds of secure aggregation with the real members and aggregator: whether masks are used once, and cancel.

The parameters have the plan's names and holders, cut to a few values each; the same values are summed in all rounds,
so that a mask which comes again, or leaves bits of the values open, shows at once. In the last round a member leaves
after it has shared its keys, if the plan's threshold lets the others go on without it.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedsea.audit.targets import Progress, unheard
from fedsea.audit.uniform import looks_uniform
from fedsea.audit.verdict import Finding, Verdict
from fedsea.client.secure import layout_of
from fedsea.errors import AggregationError, AuthError, FedseaError, ProtocolError
from fedsea.federation.secure import Aggregator, Layout, Member, Phase, Setting, Transcript, check_fresh
from fedsea.federation.secure.messages import Notary
from fedsea.model.checkpoint import Checkpoint
from fedsea.plan import FederationPlan

_KEY_BYTES = 32

MakeMember = Callable[[Setting, str, Notary], Member]

_ROUNDS = 2
"""With all members."""
_MOST_VALUES = 64
"""Of each parameter; a mask that comes again shows in so many words together."""
_FALSE_ALARM = 1e-9
"""Bound of the probability that sound masks of a plan are said to be weak."""


class _Notary:
    """Signs with a key of this process: the certificate is the public key behind the name."""

    def __init__(self, name: str) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.certificate = name.encode() + b"\0" + self._key.public_key().public_bytes_raw()

    def name(self, certificate: bytes) -> str:
        name, mark, rest = certificate[:-_KEY_BYTES].rpartition(b"\0")
        try:
            named = name.decode()
        except UnicodeDecodeError:
            named = ""
        if not mark or rest or not named:
            raise AuthError("This is no certificate of the audit's own secure rounds.")
        return named

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement)

    def verify(self, certificate: bytes, statement: bytes, signature: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(certificate[-_KEY_BYTES:]).verify(signature, statement)
        except (InvalidSignature, ValueError):  # or the certificate holds no key
            return False
        return True


def check_masks(
    plan: FederationPlan, checkpoint: Checkpoint, make: MakeMember = Member, progress: Progress = unheard
) -> list[Finding]:
    """What is wrong with the masks of a plan's secure aggregation, found by looking at what its server receives.

    Args:
        plan: With all of its clients.
        checkpoint: For the names of what is trained.
        make: In the place of the real member: a fault that is planted.
        progress: Told of rounds.
    """
    layout = _small(layout_of(plan, checkpoint))
    run_id = hashlib.sha256(secrets.token_bytes(16)).hexdigest()[:16]
    notaries = {name: _Notary(name) for name in plan.client_names}
    transcripts: list[Transcript] = []
    wrong: dict[str, None] = {}
    leavers = [""] * _ROUNDS + _who_may_leave(Setting.of(plan, run_id, 0, 1, layout))
    for number, leaver in enumerate(leavers):
        attempt = _Attempt(Setting.of(plan, run_id, number, 1, layout), notaries, make, transcripts)
        try:
            attempt.until_masked(leaver)
            said = attempt.check_sum()
        except FedseaError as error:
            said = f"Secure aggregation did not get through a round: {error.message}"
        wrong |= {said: None} if said else {}
        progress(number + 1, len(leavers))
    fresh = [
        f"Secure aggregation, {found.kind} (client {', '.join(found.clients)}): {found.detail} The server can take "
        "such masks off; use no secure aggregation with this version of fedsea."
        for found in check_fresh(transcripts)
    ]
    return [Finding(Verdict.BROKEN, sentence) for sentence in (*fresh, *_weak(transcripts), *wrong)]


def _weak(transcripts: Sequence[Transcript]) -> list[str]:
    """Clients whose masks do not cover all 64 bits.

    A client's values are the same in all rounds, so what differs between two rounds is the difference of two masks.
    """
    pairs = [
        (one, other)
        for one, other in itertools.combinations([t for t in transcripts if t.tensors], 2)
        if one.client == other.client
    ]
    allowed = _FALSE_ALARM / max(1, len(pairs))
    weak = {one.client: None for one, other in pairs if not looks_uniform(_words(one) - _words(other), allowed)}
    if not weak:
        return []
    return [
        f"Secure aggregation, weak masks (client {', '.join(weak)}): between two rounds with the same values the words "
        "differ by what does not look random in all of its bits, so the masks leave bits of the values open to the "
        "server; use no secure aggregation with this version of fedsea."
    ]


def _words(transcript: Transcript) -> npt.NDArray[np.uint64]:
    parts = [tensor.reshape(-1).numpy().view(np.uint64) for _, tensor in sorted(transcript.tensors.items())]
    return np.concatenate(parts)


def _who_may_leave(setting: Setting) -> list[str]:
    """A client without which the others go on, if the plan's threshold allows that of any."""
    for name in reversed(setting.clients):
        try:
            setting.check_enough([other for other in setting.clients if other != name])
        except AggregationError:
            continue
        return [name]
    return []


def _small(layout: Layout) -> Layout:
    groups = []
    for group in layout.groups:
        sizes = {name: torch.Size(shape).numel() for name, shape in group.shapes.items()}
        groups.append(replace(group, shapes={name: (min(_MOST_VALUES, size),) for name, size in sizes.items()}))
    return Layout(tuple(groups))


@dataclass
class _Attempt:
    """One attempt from keys to the sum.

    Attributes:
        setting: Of the attempt.
        notaries: Client to who signs for it.
        make: Makes the members.
        transcripts: Added to: what the server receives.
    """

    setting: Setting
    notaries: Mapping[str, _Notary]
    make: MakeMember
    transcripts: list[Transcript]

    def __post_init__(self) -> None:
        names = self.setting.clients
        self._server = Aggregator(self.setting, names, self.notaries[names[0]])
        self._members = {name: self.make(self.setting, name, self.notaries[name]) for name in names}

    def until_masked(self, leaver: str = "") -> None:
        """Keys, shares and masked words of all, but for the words of one who leaves."""
        server, setting = self._server, self.setting
        keys = {name: member.advertise() for name, member in self._members.items()}
        for ad in keys.values():
            server.add_keys(ad)
        server.proceed()
        for name, member in self._members.items():
            server.add_shares(name, member.share(tuple(server.roster.values())))
        server.proceed()
        self._members.pop(leaver, None)
        for name, member in self._members.items():
            member.receive(server.delivery(name))
            masked = member.mask(_values(setting, name), _weight(setting, name))
            words = _tensors(setting.layout, name, masked)
            server.accumulate(name, words)
            server.add_masked(name)
            self.transcripts.append(Transcript(name, setting.round, setting.attempt, keys[name], words))

    def check_sum(self) -> str:
        """Take the masks off and hold what is left against the plain mean; what is wrong, "" if nothing."""
        server = self._server
        server.proceed()
        for name, member in self._members.items():
            server.add_consent(name, member.consent(server.survivors))
        server.proceed()
        for name, member in self._members.items():
            server.add_reveal(name, member.reveal(server.signatures))
        server.proceed()
        assert server.phase is Phase.DONE
        means, _ = server.unmask()
        expected = _plain_means(self.setting, tuple(self._members))
        # A mean is rounded to float32 at its end.
        bound = 2 * self.setting.numbers.error + 1e-6
        off = [name for name, mean in expected.items() if not float((means[name] - mean).abs().max()) <= bound]
        if means.keys() == expected.keys() and not off:
            return ""
        return (
            "Secure aggregation: the masks do not cancel: what is left of the sum is not the mean of what the clients "
            "put in. Training with it would go wrong; use no secure aggregation with this version of fedsea."
        )


def _tensors(layout: Layout, name: str, masked: Mapping[int, npt.NDArray[np.uint64]]) -> dict[str, torch.Tensor]:
    """A member's words by parameter, whatever it made.

    Raises:
        ProtocolError: They are not those of its groups.
    """
    expected = {index: layout.groups[index].num_values + 1 for index in layout.of_client(name)}
    if {index: vector.size for index, vector in masked.items()} != expected or any(
        vector.dtype != np.uint64 or vector.ndim != 1 for vector in masked.values()
    ):
        raise ProtocolError(f"Client {name} masked other values than those that it holds.")
    return layout.to_tensors(dict(masked))


def _weight(setting: Setting, name: str) -> int:
    """Another for each client, so that a mean without weights shows."""
    return 1 + setting.clients.index(name) % setting.numbers.most_weight


def _plain_means(setting: Setting, survivors: Sequence[str]) -> dict[str, torch.Tensor]:
    """Weighted mean of every parameter that survivors hold, without any masks."""
    values = {name: _values(setting, name) for name in survivors}
    means: dict[str, torch.Tensor] = {}
    for group in setting.layout.groups:
        holders = [name for name in group.holders if name in values]
        total = sum(_weight(setting, name) for name in holders)
        for key in group.shapes if holders else ():
            parts = [values[name][key].double() * _weight(setting, name) for name in holders]
            means[key] = torch.stack(parts).sum(dim=0) / total
    return means


def _values(setting: Setting, name: str) -> dict[str, torch.Tensor]:
    """As small as trained adapters are, another for each client, and the same in every round."""
    layout = setting.layout
    draw = torch.Generator().manual_seed(setting.clients.index(name))
    groups = [layout.groups[index] for index in layout.of_client(name)]
    return {key: 0.02 * torch.randn(shape, generator=draw) for group in groups for key, shape in group.shapes.items()}
