"""A client's part of one attempt: advertise, share, mask, consent, reveal; each once, in this order.

Nothing of an attempt outlives it, on purpose: a client that starts again, or whose connection broke, takes part in the
next attempt with fresh keys, and never masks two inputs with the same ones. Any disagreement about who is in the sum
stops the member before it reveals anything (the consistency check of Bonawitz et al., figure 4).
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Collection, Mapping, Sequence

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedsea.errors import AuthError, ProtocolError, UnprotectedRelease
from fedsea.federation.secure import shamir
from fedsea.federation.secure.layout import Setting, Words
from fedsea.federation.secure.masks import add_streams, open_shares, pair_stream_key, seal_shares, self_stream_key
from fedsea.federation.secure.messages import (
    KEY_BYTES,
    Advertisement,
    Notary,
    advertised,
    agreed_survivors,
    commitment_to,
    roster_digest,
)


class _Stage(enum.Enum):
    NEW, ADVERTISED, SHARED, MASKED, CONSENTED, REVEALED = range(6)


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The public half of a key."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


class Member:
    """One client in one attempt.

    Args:
        setting: As this client makes it from its own plan.
        name: The client.
        notary: Its certificate's key, and the federation's authority.
    """

    def __init__(self, setting: Setting, name: str, notary: Notary) -> None:
        self.setting = setting
        self.name = name
        self._notary = notary
        self._sharing_key = X25519PrivateKey.generate()
        self._mask_key = X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(KEY_BYTES)
        self._stage = _Stage.NEW
        self._own: Advertisement | None = None
        self._roster: dict[str, Advertisement] = {}
        self._digest = b""
        self._shares: dict[str, bytes] = {}
        self._survivors: frozenset[str] = frozenset()

    @property
    def survivors(self) -> frozenset[str]:
        """Whose sum this member has consented to; empty before."""
        return self._survivors

    def _go(self, before: _Stage, after: _Stage) -> None:
        if self._stage is not before:
            raise ProtocolError("The server asked for a part of secure aggregation twice, or out of turn; reconnect.")
        self._stage = after

    # --- keys -------------------------------------------------------------------------------------------------------

    def advertise(self) -> Advertisement:
        """This member's fresh public keys, signed."""
        self._go(_Stage.NEW, _Stage.ADVERTISED)
        place, notary = self.setting.place, self._notary
        commitment = commitment_to(self._seed, place, self.name)
        keys = (notary.certificate, public_bytes(self._sharing_key), public_bytes(self._mask_key), commitment)
        unsigned = Advertisement(self.name, *keys, b"")
        self._own = Advertisement(self.name, *keys, notary.sign(advertised(place, unsigned)))
        return self._own

    def share(self, roster: Sequence[Advertisement]) -> dict[str, bytes]:
        """Take the members' keys; the shares of this member's secrets, sealed for each other member.

        Raises:
            AggregationError: They are too few.
            ProtocolError: Someone is none of the plan's clients, is there twice, or did not sign these keys.
        """
        self._go(_Stage.ADVERTISED, _Stage.SHARED)
        self._check_roster(roster)
        self._roster = {ad.name: ad for ad in roster}
        self._digest = roster_digest(self.setting.place, roster)
        private = self._mask_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        mask_shares = shamir.split(private, self.setting.threshold, len(roster))
        seed_shares = shamir.split(self._seed, self.setting.threshold, len(roster))
        sealed = {}
        for ad, *both in zip(roster, mask_shares, seed_shares, strict=True):
            plain = b"".join(both)
            if ad.name == self.name:
                self._shares[self.name] = plain
            else:
                way = (self.name, ad.name)
                sealed[ad.name] = seal_shares(self._sharing_key, ad.sharing_key, self._digest, way, plain)
        return sealed

    def _check_roster(self, roster: Sequence[Advertisement]) -> None:
        names = [ad.name for ad in roster]
        if names != [name for name in self.setting.clients if name in names]:
            raise ProtocolError(
                "The server's list of members names someone twice, out of order, or who is none of the plan's clients. "
                "Nothing was sent; ask its operator why."
            )
        if self._own not in roster:
            raise ProtocolError("The server's list of members does not have this client's own keys. Nothing was sent.")
        self.setting.check_enough(names)
        keys = [key for ad in roster for key in (ad.sharing_key, ad.mask_key, ad.commitment)]
        if len(set(keys)) != len(keys):
            raise ProtocolError("Two members have the same key. Nothing was sent; ask the server's operator why.")
        for ad in roster:
            try:
                certified = self._notary.name(ad.certificate)
            except AuthError:
                certified = ""
            statement = advertised(self.setting.place, ad)
            if certified != ad.name or not self._notary.verify(ad.certificate, statement, ad.signature):
                raise ProtocolError(
                    f"The keys that the server gives for {ad.name} are not signed with that client's certificate for "
                    "this attempt. Nothing was sent; ask the server's operator, and that client's."
                )

    # --- masks ------------------------------------------------------------------------------------------------------

    def receive(self, delivered: Mapping[str, bytes]) -> None:
        """Take the shares of the other members, before anything is masked.

        Raises:
            AggregationError: They are of too few.
            ProtocolError: A sender is no member, or its shares do not open.
        """
        if self._stage is not _Stage.SHARED or len(self._shares) != 1:
            raise ProtocolError("The server delivered shares twice, or out of turn; reconnect.")
        if self.name in delivered or not delivered.keys() <= self._roster.keys():
            raise ProtocolError("The server delivered shares of someone who is no other member. Nothing was masked.")
        opened = dict(self._shares)
        for sender, sealed in delivered.items():
            way, key = (sender, self.name), self._roster[sender].sharing_key
            plain = open_shares(self._sharing_key, key, self._digest, way, sealed)
            if len(plain) != 2 * shamir.SHARE_BYTES:
                raise ProtocolError(f"The shares of {sender} have a wrong size. Nothing was masked; ask that client.")
            opened[sender] = plain
        self.setting.check_enough(opened)
        self._shares = opened

    def mask(self, values: Mapping[str, torch.Tensor], weight: int) -> Words:
        """This member's values times its weight, and the weight, under fresh masks.

        Args:
            values: All trained parameters of this client.
            weight: Target tokens that they were trained on.

        Raises:
            AggregationError: A value is outside the range; nothing was masked.
            UnprotectedRelease: These masks were used before.
        """
        if self._stage is not _Stage.SHARED or len(self._shares) < 2:
            raise UnprotectedRelease(
                "Values were about to be masked with masks that were used before, or that nobody shares: that would "
                "show their difference. Nothing was sent; report this."
            )
        words = self._words(values, weight)
        self._go(_Stage.SHARED, _Stage.MASKED)
        for index, vector in words.items():
            holders = [n for n in self.setting.layout.groups[index].holders if n in self._shares and n != self.name]
            keys = {name: self._pair_key(name, index) for name in holders}
            own = self_stream_key(self._seed, self._digest, self.name, index)
            plus = [key for name, key in keys.items() if self.name < name]
            add_streams(vector, [own, *plus], [key for name, key in keys.items() if name < self.name])
        return words

    def _pair_key(self, other: str, group: int) -> bytes:
        key = self._roster[other].mask_key
        return pair_stream_key(self._mask_key, key, self._digest, (self.name, other), group)

    def _words(self, values: Mapping[str, torch.Tensor], weight: int) -> Words:
        layout, numbers = self.setting.layout, self.setting.numbers
        words: Words = {}
        for index in layout.of_client(self.name):
            group = layout.groups[index]
            words[index] = vector = layout.zeros_of(index)
            for name, _, part in group.slices():
                vector[part] = numbers.encode(values[name], weight, name)
            vector[-1] = weight
        return words

    # --- the end ----------------------------------------------------------------------------------------------------

    def consent(self, survivors: Collection[str]) -> bytes:
        """This member's signature that exactly these are in the sum.

        Raises:
            AggregationError: They are too few.
            ProtocolError: This member is not among them, or someone is who shared nothing.
        """
        self._go(_Stage.MASKED, _Stage.CONSENTED)
        chosen = frozenset(survivors)
        if self.name not in chosen or not chosen <= self._shares.keys() or len(chosen) != len(survivors):
            raise ProtocolError(
                "The server's list of who is in the sum lacks this client, or has someone who shared no keys: nothing "
                "was revealed. Ask its operator why."
            )
        self.setting.check_enough(chosen)
        self._survivors = chosen
        return self._notary.sign(agreed_survivors(self._digest, self._shares.keys(), chosen))

    def reveal(self, signatures: Mapping[str, bytes]) -> dict[str, bytes]:
        """One share for each who shared: of the self mask's seed for who is in the sum, of the mask key for the others.

        Args:
            signatures: Member to its signature of the same survivors.

        Raises:
            ProtocolError: Too few have signed, or someone has signed other survivors.
        """
        self._go(_Stage.CONSENTED, _Stage.REVEALED)
        statement = agreed_survivors(self._digest, self._shares.keys(), self._survivors)
        for name, signature in signatures.items():
            known = name in self._survivors
            if not known or not self._notary.verify(self._roster[name].certificate, statement, signature):
                raise ProtocolError(
                    f"The server shows no consent of {name} to the same sum: it may have told members different things "
                    "about who dropped out. Nothing was revealed; ask its operator why."
                )
        if len(signatures) < self.setting.threshold:
            raise ProtocolError(
                f"Only {len(signatures)} members have consented to the sum, and {self.setting.threshold} must: nothing "
                "was revealed. Ask the server's operator why."
            )
        return {
            name: both[shamir.SHARE_BYTES :] if name in self._survivors else both[: shamir.SHARE_BYTES]
            for name, both in self._shares.items()
        }
