"""What the server sees in use: prompts and answers go through the real decoder, boundary and encoder.

It is not what training sends: with a clip every row is clipped by itself, to C / sqrt(M) in a session that may become M
rows long, and the rows of an answer leave one by one. Each session is as short as it can be: a longer one is clipped
more.

T  tokens of one session, H  hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import cast

import torch

from fedsea.audit.curves import fresh
from fedsea.audit.observe import Change, Tap, Tapped
from fedsea.audit.targets import Observation, Progress, Target, unheard
from fedsea.client.decoding import SplitDecoder
from fedsea.client.generation import GenerationSettings, generate
from fedsea.client.local_trunk import LocalSession, LocalTrunk
from fedsea.client.trunk import Sealed
from fedsea.privacy.boundary import Boundary
from fedsea.types import IGNORE, Origin, Release, Reply
from fedsea.wire import messages as m

_NEW_TOKENS = 8
"""Of an answer, each of which is a release of its own."""


@dataclass(frozen=True, slots=True)
class Use:
    """One prompt and its answer, as the server saw them.

    Attributes:
        target: Prompt and answer, but for the answer's last token, which is not sent.
        answer: All of the answer, and the trunk's outputs as the client decoded them, those of the prompt included.
        taps: Before the boundary and behind the decoder, message by message.
        begins: Tokens of the prompt.
    """

    target: Target
    answer: Target
    taps: tuple[Tapped, ...]
    begins: int


class _Noting:
    """A boundary that notes what it is given; the boundary itself makes the release."""

    def __init__(self, boundary: Boundary, change: Change | None) -> None:
        self._boundary, self._change = boundary, change
        self.given: list[torch.Tensor] = []

    def hidden(self, hidden_TH: torch.Tensor, origin: Origin) -> Release:
        """As `Boundary.hidden`."""
        if self._change is not None:
            hidden_TH = self._change(hidden_TH)
        self.given.append(hidden_TH.float().cpu())
        return self._boundary.hidden(hidden_TH, origin)


class _Session:
    """A session whose messages travel as bytes, both ways."""

    def __init__(self, inner: LocalSession, tap: Tap) -> None:
        self._inner, self._tap = inner, tap
        self.version = inner.version
        self.seen: list[torch.Tensor] = []
        self.answered: list[torch.Tensor] = []

    def extend(
        self, hidden: Sealed, positions: Sequence[int], lengths: Sequence[int], sources: Sequence[int] = ()
    ) -> Future[torch.Tensor]:
        """See `TrunkSession.extend`."""
        number = len(self.seen)
        sent = m.SessionForward(0, number, tuple(positions), tuple(lengths), tuple(sources), False, hidden)
        self.seen.append(self._tap.over("client", "server", sent).cpu())
        output_TH = self._inner.extend({"": self.seen[-1].to(self._tap.trunk.device)}, positions, lengths).result()
        reply = m.SessionOutput(0, number, Reply({"": output_TH}))
        self.answered.append(self._tap.over("server", "client", reply).cpu())
        future: Future[torch.Tensor] = Future()
        future.set_result(self.answered[-1])
        return future

    def close(self) -> None:
        """See `TrunkSession.close`."""
        self._inner.close()


class _Trunk(LocalTrunk):
    """The tap's trunk; what reaches it was sealed by the real encoder."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap.trunk, tap.plan, tap.name)
        self._tap = tap
        self.opened: list[_Session] = []

    def seal(self, release: Release) -> Sealed:
        return self._tap.seal(release)

    def open_session(self, max_tokens: int, num_sequences: int = 1) -> _Session:  # type: ignore[override]
        self.opened.append(_Session(super().open_session(max_tokens, num_sequences), self._tap))
        return self.opened[-1]


def use(tap: Tap, targets: Sequence[Target], progress: Progress = unheard) -> list[Use]:
    """Ask for an answer to each text, as `fedsea generate` and the gateway do.

    Args:
        tap: Its segments, trunk, boundary and encoders are used; its plan must allow inference.
        targets: Prompts; what was observed of them stays as it is.
        progress: Told of answers.

    Returns:
        One for each; none if sessions are too short for a prompt and an answer.

    Raises:
        ConfigError: The model cannot decode.
    """
    boundary, trunk = _Noting(tap.boundary, tap.change), _Trunk(tap)
    decoder = SplitDecoder(tap.plan, tap.segments, trunk, cast(Boundary, boundary))
    new = min(_NEW_TOKENS, max(1, decoder.max_tokens // 2))
    found = []
    for number, target in enumerate(fresh(targets, decoder.max_tokens - new)):
        if len(target.ids_T) <= target.begins:  # a prompt that everybody knows
            continue
        boundary.given.clear()
        prompt = target.ids_T.tolist()
        with generate(decoder, prompt, GenerationSettings(max_new_tokens=new)) as generation:
            answer = [token.id for token in generation]
        found.append(_use(target, boundary.given, trunk.opened.pop(), answer, len(prompt) + new))
        progress(number + 1, len(targets))
    return found


def _use(target: Target, given: Sequence[torch.Tensor], session: _Session, answer: list[int], most_rows: int) -> Use:
    taps = tuple(
        Tapped(raw_TH.clone(), seen_TH.clone(), most_rows) for raw_TH, seen_TH in zip(given, session.seen, strict=True)
    )
    ids_T = torch.tensor([*target.ids_T.tolist(), *answer[:-1]])
    seen_TH = torch.cat([tapped.seen_TH for tapped in taps])
    observation = Observation(seen_TH, None, len(seen_TH), most_rows=most_rows)
    silent_T = torch.full_like(ids_T, IGNORE)
    whole = replace(target, ids_T=ids_T, targets_T=silent_T, observations=[observation])
    said_N = torch.tensor(answer)
    computed = replace(observation, output_TH=torch.cat(session.answered))
    asked = Target("", said_N, torch.full_like(said_N, IGNORE), (), [computed], own=target.own)
    return Use(whole, asked, taps, len(target.ids_T))
