"""A round's end with secure aggregation: attempts, until the sum of the clients' parameters is there.

A part of the coordinator; like it, it runs on the event loop and never blocks. What is collected, and checked, is
`federation.secure.Aggregator`; here is who is asked when, and what follows when somebody leaves.

Everybody who is expected has to be in the sum if the plan waits for all, or if an earlier attempt of this round came so
far that members may have revealed a sum: a second sum over others would show the difference. Otherwise those who leave
are left out, as long as enough stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias

from fedsea.errors import AggregationError, ProtocolError
from fedsea.federation.secure import Advertisement, Aggregator, Layout, Phase, Setting, Verifier
from fedsea.server.closing import read_note, skip, stop, unmask, write_note
from fedsea.server.context import Run
from fedsea.server.executor.local import Priority
from fedsea.server.state import RunState
from fedsea.wire import messages as m

log = logging.getLogger(__name__)

_MOST_ATTEMPTS = 3
_NOTE = "secure.json"

FromMember: TypeAlias = m.SecureKeys | m.SecureShares | m.SecureUpdate | m.SecureConsent | m.SecureReveal


class Rounds(Protocol):
    """What a secure round leaves to the coordinator."""

    @property
    def round_due(self) -> bool:
        """Whether a round's steps are done and its sum is not."""
        ...

    def expected(self) -> tuple[str, ...]:
        """Whose parameters the round is made of."""
        ...

    def aggregated(self, state: RunState) -> None:
        """The round is closed and durable."""
        ...


class SecureRounds:
    """Makes the sums of a run's rounds, one after the other.

    Args:
        run: The run.
        rounds: The coordinator.
        verifier: Checks members' certificates.
    """

    def __init__(self, run: Run, rounds: Rounds, verifier: Verifier) -> None:
        self._run = run
        self._rounds = rounds
        self._verifier = verifier
        self.layout = Layout.of({name: run.roster[name].shapes for name in run.plan.client_names})
        Setting.of(run.plan, run.state.run_id, 0, 0, self.layout)  # refuses now what it would refuse at a round's end
        self._current: Aggregator | None = None
        self._adding: set[str] = set()
        self._attempt = 0
        self._failures = 0
        self._ending = False  # no more attempts: the round is being closed without a sum, or the run stops
        self._bound = read_note(self._note_path, run.state.rounds_done)

    @property
    def _note_path(self) -> Path:
        return self._run.store.folder / _NOTE

    @property
    def _everybody(self) -> bool:
        return self._run.wait_s is None or self._bound is not None

    # --- for the coordinator ----------------------------------------------------------------------------------------

    def waiting_for(self) -> tuple[str, ...]:
        """Members whose turn it is."""
        current = self._current
        return () if current is None else tuple(n for n in current.waiting_for() if n not in self._adding)

    def arrived(self) -> tuple[str, ...]:
        """Members that wait for them."""
        return () if self._current is None else self._current.arrived()

    def stage(self) -> Hashable:
        """What they are at; another one begins the waiting anew."""
        phase = None if self._current is None else self._current.phase
        return "secure", self._run.state.rounds_done, self._attempt, phase

    def join(self, name: str) -> None:
        """A client is there (again) while a round is due."""
        current = self._current
        if current is not None and current.awaits(name, Phase.KEYS):
            self._send_open(name)

    def leave(self, name: str) -> None:
        """A client's stream has ended; its keys of this attempt went with it."""
        current = self._current
        if current is None or name not in current.members:
            return
        if current.phase is Phase.KEYS:
            current.withdraw(name)
        elif current.phase <= Phase.MASKED and self._everybody:
            log.info("client %s left in the middle of secure aggregation: it begins again", name)
            self._open()
        else:
            current.drop(name)

    def late(self, names: tuple[str, ...]) -> None:
        """Others have waited long enough for these."""
        if (current := self._current) is None:
            return
        log.info("secure aggregation of round %d goes on without %s", self._run.state.rounds_done, ", ".join(names))
        for name in names:
            current.drop(name)
        self.advance()

    def advance(self) -> None:
        """Go on as far as possible."""
        if self._current is None:
            self._open()
        current = self._current
        while not (current is None or self._ending or self._adding or current.phase is Phase.DONE):
            if current.waiting_for() or not current.members:
                return
            try:
                self._check_everybody(current)
                current.proceed()
            except AggregationError as error:
                self._failed(error)
                return
            self._tell(current)
            current = self._current

    def receive(self, name: str, message: FromMember) -> None:
        """Take a member's message; one of an attempt that was given up is ignored.

        Raises:
            ProtocolError: It does not fit what the attempt expects of this client.
        """
        current = self._current
        if current is None or (message.round, message.attempt) != (current.setting.round, current.setting.attempt):
            return
        if isinstance(message, m.SecureKeys) and current.phase is not Phase.KEYS and name in current.members:
            self.leave(name)  # it has begun anew, without the keys that it had
            return
        if name not in current.members or current.is_gone(name):
            return
        match message:
            case m.SecureKeys():
                keys = (message.certificate, message.sharing_key, message.mask_key, message.commitment)
                current.withdraw(name)
                current.add_keys(Advertisement(name, *keys, message.signature))
            case m.SecureShares():
                current.add_shares(name, dict(zip(message.names, message.sealed, strict=True)))
            case m.SecureUpdate():
                self._add_masked(current, name, message)
            case m.SecureConsent():
                current.add_consent(name, message.signature)
            case m.SecureReveal():
                current.add_reveal(name, dict(zip(message.names, message.shares, strict=True)))

    # --- attempts ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """The next attempt: everybody makes fresh keys."""
        if self._ending:
            return
        self._attempt += 1
        self._adding.clear()
        plan, state = self._run.plan, self._run.state
        setting = Setting.of(plan, state.run_id, state.rounds_done, self._attempt, self.layout)
        expected = self._bound or self._rounds.expected()
        self._current = Aggregator(setting, expected, self._verifier)
        for name in expected:
            if name in self._run.connected:
                self._send_open(name)

    def _send_open(self, name: str) -> None:
        self._run.ports.send(name, m.RoundOpen(self._run.state.rounds_done, self._attempt))

    def _check_everybody(self, current: Aggregator) -> None:
        expected = set(self._bound or (self._rounds.expected() if self._everybody else ()))
        missing = expected.difference(current.arrived())
        if current.phase <= Phase.MASKED and missing:
            raise AggregationError(
                f"Round {current.setting.round} needs all of the clients that began its sum, and these are not there: "
                f"{', '.join(sorted(missing))}. Nothing more was revealed: bring them back."
            )

    def _tell(self, current: Aggregator) -> None:
        """What the members need for the phase that begins."""
        place = current.setting.round, current.setting.attempt
        match current.phase:
            case Phase.SHARES:
                ads = tuple(current.roster.values())
                columns = zip(
                    *((a.name, a.certificate, a.sharing_key, a.mask_key, a.commitment, a.signature) for a in ads),
                    strict=True,
                )
                roster = m.SecureRoster(*place, *(tuple(column) for column in columns))
                self._send(current, lambda _: roster)
            case Phase.MASKED:
                self._send(current, lambda name: m.SecureDelivery(*place, *_columns(current.delivery(name))))
            case Phase.CONSENT:
                self._send(current, lambda _: m.SecureSurvivors(*place, current.survivors))
            case Phase.REVEAL:
                evidence = m.SecureEvidence(*place, *_columns(current.signatures))
                self._note(current, lambda: self._send(current, lambda _: evidence))
            case Phase.DONE:
                job = partial(unmask, self._run, current)
                self._run.ports.submit(Priority.CONTROL, job, partial(self._unmasked, current))

    def _send(self, current: Aggregator, message: Callable[[str], m.Message]) -> None:
        for name in current.waiting_for():
            self._run.ports.send(name, message(name))

    def _add_masked(self, current: Aggregator, name: str, message: m.SecureUpdate) -> None:
        tensors = message.tensors
        if not current.awaits(name, Phase.MASKED) or name in self._adding:
            raise ProtocolError(f"Client {name} sent masked parameters twice, or out of turn.")
        assert isinstance(tensors, dict)
        current.setting.layout.check(name, tensors)
        self._adding.add(name)

        def then(_: None) -> None:
            if self._current is current:
                self._adding.discard(name)
                current.add_masked(name)
                self.advance()

        self._run.ports.submit(Priority.CONTROL, partial(current.accumulate, name, tensors), then)

    def _note(self, current: Aggregator, then: Callable[[], None]) -> None:
        """Before members reveal a sum it is on disk whose it is: after a restart no other one is asked for.

        Nor may the round be skipped then: members would go on with the values that are in that sum.
        """

        def noted(_: None) -> None:
            self._bound = current.survivors
            if self._current is current:
                then()
                self.advance()

        self._run.ports.submit(Priority.CONTROL, partial(write_note, self._note_path, current), noted)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _unmasked(self, current: Aggregator, outcome: RunState | AggregationError) -> None:
        if self._current is not current:
            return
        if isinstance(outcome, AggregationError):
            self._failed(outcome)
        else:
            self._close(outcome)

    def _close(self, state: RunState) -> None:
        self._current, self._bound, self._failures, self._attempt = None, None, 0, 0
        self._ending = False
        self._rounds.aggregated(state)

    def _failed(self, error: AggregationError) -> None:
        self._failures += 1
        log.warning("attempt %d of secure aggregation failed: %s", self._attempt, error.message)
        if self._failures < _MOST_ATTEMPTS:
            self._open()
            return
        self._ending = True
        if self._run.plan.aggregation.secure_failure == "skip" and self._bound is None:
            log.warning("round %d is not averaged: clients keep their own parameters", self._run.state.rounds_done)
            self._run.ports.submit(Priority.CONTROL, partial(skip, self._run), self._close)
        else:
            self._run.ports.submit(Priority.CONTROL, partial(stop, error), lambda _: None)


def _columns(entries: dict[str, bytes]) -> tuple[tuple[str, ...], tuple[bytes, ...]]:
    return tuple(entries), tuple(entries.values())
