"""The server's part of one attempt: collects what members send, and takes the masks off their sum.

A plain object without clocks or connections. It never holds more of a client's values than its masked words, and adds
these to the sum as they arrive.
"""

from __future__ import annotations

import enum
import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsea.errors import AggregationError, ProtocolError
from fedsea.federation.secure import shamir
from fedsea.federation.secure.layout import Setting
from fedsea.federation.secure.masks import add_streams, pair_stream_key, self_stream_key
from fedsea.federation.secure.member import public_bytes
from fedsea.federation.secure.messages import (
    Advertisement,
    Verifier,
    advertised,
    agreed_survivors,
    commitment_to,
    roster_digest,
)

_MOST_TRIES = 256
"""Sets of shares that are tried when several are wrong: all, if these are not more."""
_ANY = random.SystemRandom()


class Phase(enum.IntEnum):
    """What the members are to send next."""

    KEYS, SHARES, MASKED, CONSENT, REVEAL, DONE = range(6)


class Aggregator:
    """One attempt, as the server sees it.

    Args:
        setting: As made from the plan.
        expected: Clients that are to take part, in the plan's order.
        verifier: Checks certificates.

    Attributes:
        phase: What is collected now.
        members: Those who have sent everything so far, of whom something is awaited in this phase unless they left.
        survivors: Those whose masked words are in the sum; known from the phase CONSENT on.
    """

    def __init__(self, setting: Setting, expected: tuple[str, ...], verifier: Verifier) -> None:
        self.setting = setting
        self.phase = Phase.KEYS
        self.members: tuple[str, ...] = expected
        self.survivors: tuple[str, ...] = ()
        self.roster: dict[str, Advertisement] = {}
        self.sharers: tuple[str, ...] = ()
        self.signatures: dict[str, bytes] = {}
        self._verifier = verifier
        self._digest = b""
        self._sealed: dict[str, dict[str, bytes]] = {}
        self._sum = setting.layout.zeros()
        self._masked: set[str] = set()
        self._revealed: dict[str, dict[str, bytes]] = {}
        self._gone: set[str] = set()
        self._good: tuple[str, ...] = ()

    # --- what is collected ------------------------------------------------------------------------------------------

    @property
    def _arrived(self) -> Collection[str]:
        collections: dict[Phase, Collection[str]] = {
            Phase.KEYS: self.roster,
            Phase.SHARES: self._sealed,
            Phase.MASKED: self._masked,
            Phase.CONSENT: self.signatures,
            Phase.REVEAL: self._revealed,
            Phase.DONE: self.members,
        }
        return collections[self.phase]

    def waiting_for(self) -> tuple[str, ...]:
        """Members from whom this phase still awaits something."""
        return tuple(name for name in self.members if name not in self._arrived and name not in self._gone)

    def arrived(self) -> tuple[str, ...]:
        """Members that have sent what this phase awaits."""
        return tuple(name for name in self.members if name in self._arrived)

    def awaits(self, name: str, phase: Phase) -> bool:
        """Whether a member is to send this now."""
        return phase is self.phase and name in self.waiting_for()

    def drop(self, name: str) -> None:
        """A member is gone: masked words that it has sent count, and nothing more is awaited from it."""
        self._gone.add(name)

    def is_gone(self, name: str) -> bool:
        """Whether a member was dropped."""
        return name in self._gone

    def withdraw(self, name: str) -> None:
        """A member whose keys nobody else has seen yet will send others."""
        assert self.phase is Phase.KEYS
        self.roster.pop(name, None)

    def _expect(self, name: str, phase: Phase) -> None:
        if not self.awaits(name, phase):
            raise ProtocolError(f"Client {name} sent a part of secure aggregation twice, or out of turn.")

    def add_keys(self, ad: Advertisement) -> None:
        """A member's keys.

        Raises:
            ProtocolError: They are not signed by it, or out of turn.
        """
        self._expect(ad.name, Phase.KEYS)
        statement = advertised(self.setting.place, ad)
        named = self._verifier.name(ad.certificate)
        if named != ad.name or not self._verifier.verify(ad.certificate, statement, ad.signature):
            raise ProtocolError(f"Client {ad.name} sent keys that are not signed with its certificate.")
        self.roster[ad.name] = ad

    def add_shares(self, name: str, sealed: Mapping[str, bytes]) -> None:
        """A member's shares, sealed for each other member.

        Raises:
            ProtocolError: One is missing or too many, or out of turn.
        """
        self._expect(name, Phase.SHARES)
        if sealed.keys() != self.roster.keys() - {name}:
            raise ProtocolError(f"Client {name} must send one sealed share for every other member.")
        self._sealed[name] = dict(sealed)

    def accumulate(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add a member's masked words to the sum: all that is kept of them. `add_masked` notes that it is done.

        Raises:
            ProtocolError: They are not exactly what this client holds.
        """
        self.setting.layout.add(self._sum, name, tensors)

    def add_masked(self, name: str) -> None:
        """A member's masked words are in the sum; so they are even if it has left meanwhile."""
        assert self.phase is Phase.MASKED
        self._masked.add(name)

    def add_consent(self, name: str, signature: bytes) -> None:
        """A member's consent to the survivors.

        Raises:
            ProtocolError: It is not its signature of them, or out of turn.
        """
        self._expect(name, Phase.CONSENT)
        statement = agreed_survivors(self._digest, self.sharers, self.survivors)
        if not self._verifier.verify(self.roster[name].certificate, statement, signature):
            raise ProtocolError(
                f"Client {name} sent a consent to secure aggregation that it did not sign for this sum."
            )
        self.signatures[name] = signature

    def add_reveal(self, name: str, shares: Mapping[str, bytes]) -> None:
        """A member's shares of what takes the masks off.

        Raises:
            ProtocolError: One is missing or too many, or out of turn.
        """
        self._expect(name, Phase.REVEAL)
        if shares.keys() != set(self.sharers):
            raise ProtocolError(f"Client {name} must reveal one share for every member that shared.")
        self._revealed[name] = dict(shares)

    # --- from phase to phase ----------------------------------------------------------------------------------------

    def proceed(self) -> Phase:
        """Close the phase: go on with those who have sent everything.

        Raises:
            AggregationError: They are too few.
        """
        left = self.arrived()
        if self.phase in (Phase.KEYS, Phase.SHARES):  # who left already need not be counted on
            left = tuple(name for name in left if name not in self._gone)
        self.setting.check_count(left)
        if self.phase <= Phase.MASKED:
            self.setting.check_groups(left)
        self.members = left
        if self.phase is Phase.KEYS:
            order = [name for name in self.setting.clients if name in left]
            self.roster = {name: self.roster[name] for name in order}
            self._digest = roster_digest(self.setting.place, tuple(self.roster.values()))
        elif self.phase is Phase.SHARES:
            self.sharers = left
        elif self.phase is Phase.MASKED:
            self.survivors = left
        self.phase = Phase(self.phase + 1)
        return self.phase

    def delivery(self, name: str) -> dict[str, bytes]:
        """The shares that others have sealed for a member."""
        return {sender: self._sealed[sender][name] for sender in self.sharers if sender != name}

    # --- taking the masks off ---------------------------------------------------------------------------------------

    def unmask(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """The weighted mean of every parameter that survivors hold.

        Returns:
            Mean by parameter, and the sum of its survivors' weights by parameter.

        Raises:
            AggregationError: Shares do not give back what was advertised, so the masks cannot be taken off.
        """
        assert self.phase is Phase.DONE
        self._take_off_self_masks()
        self._take_off_pair_masks()
        means: dict[str, torch.Tensor] = {}
        weights: dict[str, int] = {}
        for index, group in enumerate(self.setting.layout.groups):
            holders = [name for name in group.holders if name in self.survivors]
            if not holders:
                continue
            vector = self._sum[index]
            weight = int(vector[-1])
            if not 0 < weight <= len(holders) * self.setting.numbers.most_weight:
                raise AggregationError(
                    f"The sum of round {self.setting.round} makes no sense: a member masked otherwise than the others. "
                    "Nothing was taken over and everybody's state is kept; look at the clients' versions of fedsea."
                )
            for name, shape, part in group.slices():
                means[name] = self.setting.numbers.decode(vector[part], weight).view(shape)
                weights[name] = weight
        return means, weights

    def _take_off_self_masks(self) -> None:
        for name in self.survivors:
            ad = self.roster[name]
            committed = ad.commitment
            seed = self._secret(name, lambda s, n=name, c=committed: commitment_to(s, self.setting.place, n) == c)  # type: ignore[misc]
            for index in self.setting.layout.of_client(name):
                add_streams(self._sum[index], (), [self_stream_key(seed, self._digest, name, index)])

    def _take_off_pair_masks(self) -> None:
        layout = self.setting.layout
        for gone in self.sharers:
            if gone in self.survivors:
                continue
            public = self.roster[gone].mask_key

            def fits(secret: bytes, expected: bytes = public) -> bool:
                return public_bytes(X25519PrivateKey.from_private_bytes(secret)) == expected

            key = X25519PrivateKey.from_private_bytes(self._secret(gone, fits))
            for index in layout.of_client(gone):
                others = [name for name in layout.groups[index].holders if name in self.survivors]
                keys = {
                    name: pair_stream_key(key, self.roster[name].mask_key, self._digest, (gone, name), index)
                    for name in others
                }
                # A survivor added the stream if its name comes first, and subtracted it otherwise.
                adding = [stream for name, stream in keys.items() if gone < name]
                add_streams(self._sum[index], adding, [stream for name, stream in keys.items() if name < gone])

    def _choices(self) -> Iterator[tuple[str, ...]]:
        """Sets of members whose shares to try: the last that was right, all without one member, then any."""
        count, names = self.setting.threshold, tuple(self._revealed)
        yield self._good or names[:count]
        if len(names) == count:
            return
        for left_out in names:
            yield tuple(name for name in names if name != left_out)[:count]
        if math.comb(len(names), count) <= _MOST_TRIES:
            yield from itertools.combinations(names, count)
            return
        for _ in range(_MOST_TRIES):
            yield tuple(_ANY.sample(names, count))

    def _secret(self, owner: str, fits: Callable[[bytes], bool]) -> bytes:
        """A member's secret out of the shares; should some be wrong, out of another set of them."""
        number = {name: position + 1 for position, name in enumerate(self.roster)}
        for names in self._choices():
            try:
                secret = shamir.combine({number[name]: self._revealed[name][owner] for name in names})
            except ProtocolError:
                continue
            if fits(secret):
                self._good = names
                return secret
        raise AggregationError(
            f"The shares of client {owner}'s secret do not give back what it advertised, so the masks of round "
            f"{self.setting.round} cannot be taken off. Everybody's state is kept; look at the version of fedsea of "
            f"{owner}, and of whoever is new."
        )
