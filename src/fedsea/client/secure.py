"""This client's part in secure aggregation, round after round; what is decided is `federation.secure.Member`'s.

Every attempt has fresh keys, and nothing of it outlives the connection. A round has one summand of this client, however
many attempts it takes: before it leaves, its weight is on disk, and before this client reveals anything, whose sum that
was. Another weight, or other clients, would make a second sum of the same parameters, and the two show single ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedsea.client.trunk import Secure, Trunk
from fedsea.errors import PrivacyError, ProtocolError, StorageError
from fedsea.federation.secure import Advertisement, Layout, Member, Notary, Setting
from fedsea.model import adapters
from fedsea.model.checkpoint import Checkpoint
from fedsea.plan import FederationPlan
from fedsea.privacy.boundary import Maskable
from fedsea.storage import write_bytes_atomic
from fedsea.types import SegmentKind
from fedsea.wire import messages as m

log = logging.getLogger(__name__)

_NOTE = "secure.json"


def layout_of(plan: FederationPlan, checkpoint: Checkpoint) -> Layout:
    """Which parameters are summed over which clients, as every party finds it by itself."""
    kinds = (SegmentKind.INPUT, SegmentKind.OUTPUT)
    cuts = {name: plan.partition_of(name) for name in plan.client_names}
    shapes = {cut: adapters.trainable_shapes(checkpoint.config, cut, kinds, plan.adapter) for cut in set(cuts.values())}
    return Layout.of({name: shapes[cut] for name, cut in cuts.items()})


@dataclass(frozen=True, slots=True)
class _Given:
    """What this client gave to a round's sum, as its note says.

    Attributes:
        weight: With which its parameters were masked; None in a note of an earlier version, which does not say.
        survivors: Whose sum it helped to reveal; None if it has not.
    """

    weight: int | None
    survivors: frozenset[str] | None


class SecureRounds:
    """Takes part in the attempts of a run's rounds.

    Args:
        plan: The plan.
        name: This client.
        run_id: The run.
        layout: As `layout_of` gives it.
        notary: Makes one of the identity as it is now.
        trunk: Where messages go.
        folder: Run folder.

    Raises:
        ConfigError: The plan's sums would not be precise enough.
    """

    def __init__(
        self,
        plan: FederationPlan,
        name: str,
        run_id: str,
        layout: Layout,
        notary: Callable[[], Notary],
        trunk: Trunk,
        folder: Path,
    ) -> None:
        self._plan = plan
        self._name = name
        self._run_id = run_id
        self._layout = layout
        self._notary = notary
        self._trunk = trunk
        self._note = folder / _NOTE
        self._member: Member | None = None
        self._own: Advertisement | None = None
        self._weight = 0
        self._update: tuple[int, Maskable] | None = None
        self._values: Callable[[], Maskable] | None = None
        self._setting(0, 0)

    def _setting(self, round_index: int, attempt: int) -> Setting:
        return Setting.of(self._plan, self._run_id, round_index, attempt, self._layout)

    def forget(self) -> None:
        """The connection is a new one: what was begun on the one before is over."""
        self._member = None

    def begin(self, opened: m.RoundOpen, rounds_done: int, weight: int, values: Callable[[], Maskable]) -> None:
        """Make keys for an attempt and advertise them.

        Args:
            opened: The server's call.
            rounds_done: Rounds whose sum is applied here.
            weight: Target tokens that this client trained on in the round; without any it has nothing to add.
            values: Releases the parameters; called once a round, when they are to be masked.

        Raises:
            ProtocolError: The round was closed before, or is a later one than this client is in.
            PrivacyError: This client's part in the round's sum has another weight already.
            StorageError: The note of what this client gave is damaged.
        """
        self._member = None
        if opened.round < rounds_done:
            raise ProtocolError(
                f"The server asks for the sum of round {opened.round} again, which is closed here: its run folder may "
                "be older than this client's. Nothing was sent; restore the newest run folder at the server."
            )
        if opened.round > rounds_done:  # the same parameters under another round's number, over others
            raise ProtocolError(
                f"The server asks for the sum of round {opened.round} before it closed round {rounds_done}: a second "
                "sum of the same parameters could show them. Nothing was sent; ask its operator why."
            )
        if weight == 0:
            log.info("nothing was trained here in round %d: this client takes no part in its sum", opened.round)
            return
        given = self._given(opened.round)
        if given is not None and given.weight != weight:
            raise PrivacyError(
                f"The server asks for this client's part in the sum of round {opened.round} again, with a weight other "
                "than the noted one: two sums of the same parameters with different weights show single ones. Nothing "
                "was sent; ask its operator why, and start a new run."
            )
        if self._update is not None and self._update[0] != opened.round:
            self._update = None
        self._values, self._weight = values, weight
        self._member = Member(self._setting(opened.round, opened.attempt), self._name, self._notary())
        self._own = own = self._member.advertise()
        keys = (own.certificate, own.sharing_key, own.mask_key, own.commitment)
        self._trunk.tell(m.SecureKeys(opened.round, opened.attempt, *keys, own.signature))

    def receive(self, message: Secure) -> None:
        """Answer the server; what is of an attempt that is over is ignored.

        Raises:
            AggregationError: Too few members are left, or a value is out of range; nothing was revealed.
            ProtocolError: The server, or a member, does what the protocol does not allow; nothing was revealed.
            PrivacyError: It asks for a second sum of the same round, over others.
        """
        member = self._member
        if member is None or (message.round, message.attempt) != (member.setting.round, member.setting.attempt):
            return
        place = message.round, message.attempt
        match message:
            case m.SecureRoster():
                roster = _roster(message)
                if self._own not in roster:  # an earlier connection's, or a lie: in neither case ours to answer
                    log.warning("the server's list of members has other keys of this client; it is not answered")
                    self._member = None
                    return
                sealed = member.share(roster)
                self._trunk.tell(m.SecureShares(*place, tuple(sealed), tuple(sealed.values())))
            case m.SecureDelivery():
                member.receive(dict(zip(message.names, message.sealed, strict=True)))
                self._send_masked(member)
            case m.SecureSurvivors():
                self._check_note(message)
                self._trunk.tell(m.SecureConsent(*place, member.consent(message.names)))
            case m.SecureEvidence():
                shares = member.reveal(dict(zip(message.names, message.signatures, strict=True)))
                self._write_note(member)
                self._trunk.tell(m.SecureReveal(*place, tuple(shares), tuple(shares.values())))

    def open_step(self, rounds_done: int) -> None:
        """A step begins: no attempt is under way any more, and none may be left without its result.

        Raises:
            PrivacyError: This client's parameters are in a sum of the round already.
            StorageError: The note of what this client gave is damaged.
        """
        self.forget()
        if self._given(rounds_done) is not None:
            raise PrivacyError(
                f"The server goes on with steps in round {rounds_done}, to whose sum this client has given its "
                "parameters already, without the result: going on with the same parameters could show them. Ask its "
                "operator why, and start a new run."
            )

    def close_round(self, result: m.RoundResult, rounds_done: int) -> None:
        """A round is over: nothing is revealed of it any more, and what was revealed must be in its result.

        Parameters that are in a sum, and that this client would keep, would be in the next round's again, over others
        or with other weights: the two show single ones. Others can reveal a sum that this client only masked for; the
        server closes a round without it only where the plan says "skip".

        Raises:
            PrivacyError: The round was closed without that sum, or without a part of it.
            StorageError: The note of what this client gave is damaged.
        """
        self.forget()
        own = {key for index in self._layout.of_client(self._name) for key in self._layout.groups[index].shapes}
        missing = own.difference(result.tensors)  # type: ignore[arg-type]
        notes = (self._given(number) for number in range(rounds_done, result.round + 1)) if missing else ()
        skips = self._plan.aggregation.secure_failure == "skip"
        if any(given is not None and not (skips and given.survivors is None) for given in notes):
            raise PrivacyError(
                f"The server closed round {result.round} without the sum that this client has given its parameters to "
                f"({len(missing)} of {len(own)} are missing in the result): going on with the same ones could show "
                "them. Ask its operator why, and start a new run."
            )

    def _send_masked(self, member: Member) -> None:
        setting = member.setting
        if self._update is None:
            assert self._values is not None
            self._update = setting.round, self._values()
        if self._given(setting.round) is None:  # on disk first: a later part with another weight is refused
            self._put_note(setting.round, None)
        _, update = self._update
        release = update.under(lambda values: setting.layout.to_tensors(member.mask(values, self._weight)))
        self._trunk.tell(m.SecureUpdate(setting.round, setting.attempt, self._trunk.seal(release)))

    def _write_note(self, member: Member) -> None:
        self._put_note(member.setting.round, sorted(member.survivors))

    def _put_note(self, round_index: int, survivors: list[str] | None) -> None:
        note = {"run_id": self._run_id, "round": round_index, "weight": self._weight, "survivors": survivors}
        write_bytes_atomic(self._note, json.dumps(note).encode())

    def _check_note(self, message: m.SecureSurvivors) -> None:
        given = self._given(message.round)
        if given is not None and given.survivors not in (None, set(message.names)):
            raise PrivacyError(
                f"The server asks for a second sum of round {message.round} over other clients; the difference would "
                "show single ones. Nothing was revealed; ask its operator to start it with all of the first sum's "
                "clients connected."
            )

    def _given(self, round_index: int) -> _Given | None:
        """What this client gave to a round's sum, if anything left."""
        try:
            note = json.loads(self._note.read_bytes())
            if (note["run_id"], note["round"]) != (self._run_id, round_index):
                return None
            survivors = note["survivors"]
            return _Given(note.get("weight"), None if survivors is None else frozenset(survivors))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise StorageError(
                f"{self._note} is damaged, so it is not known which sum this client has helped to: nothing was "
                "revealed. Restore the file, or take part with a new run folder."
            ) from None


def _roster(message: m.SecureRoster) -> tuple[Advertisement, ...]:
    columns = (
        message.names,
        message.certificates,
        message.sharing_keys,
        message.mask_keys,
        message.commitments,
        message.signatures,
    )
    return tuple(Advertisement(*row) for row in zip(*columns, strict=True))
