"""What became of each attack, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

from fedsea.audit.catalogue import Attack
from fedsea.audit.scoring import Score
from fedsea.audit.targets import Recovered
from fedsea.audit.verdict import Finding, Verdict, of_sets, sentences, worst
from fedsea.types import Channel

Status = Literal["run", "skipped", "not needed", "not applicable", "not asked for"]

TIME_UP = "time was up"
"""In the reason why an attack did not run."""

_ENOUGH = 0.95
"""Of what the prior leaves open; far more than makes a text EXPOSED."""

IN_USE = "session"
"""The channel of hidden states of prompts and answers."""

_FIGURES = ("recovery", "prior", "excess")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One attack.

    Attributes:
        status: "skipped" means that it should have run and did not: the audit is then inconclusive at best.
        reason: Why it did not run.
        score: Of an attack that recovers text.
        own: Result of another one, as plain values.
        answers: What it recovered; stays out of the JSON line.
        sets: Its scores of planted notes and of own texts, where both were attacked.
        in_use: It looked at prompts and answers of sessions, not at training.
    """

    attack: Attack
    status: Status
    verdict: Verdict | None = None
    reason: str = ""
    score: Score | None = None
    own: Mapping[str, Any] | None = None
    answers: Sequence[Recovered] = field(default=(), repr=False)
    in_use: bool = False
    sets: Mapping[str, Score] = field(default_factory=dict)

    @property
    def channel(self) -> str:
        """What it looked at, as reports name it."""
        return IN_USE if self.in_use else self.attack.channel.value

    @property
    def name(self) -> str:
        """Of the attack, and where if not in training."""
        return f"{self.attack.id} in use" if self.in_use and not self.attack.in_use else self.attack.id

    def to_json(self) -> dict[str, Any]:
        """Under its channel's name."""
        values: dict[str, Any] = {"title": self.attack.title, "status": self.status}
        if self.reason:
            values["reason"] = self.reason
        if self.verdict is not None:
            values["verdict"] = self.verdict.value
        if self.score is not None:
            values |= self.score.to_json()
        if self.sets:
            values["sets"] = {name: one.to_json() for name, one in self.sets.items()}
        if self.own is not None:  # an attack that names no token has null for the figures that all have
            values |= dict.fromkeys(_FIGURES) | dict(self.own)
        return values


def scored(
    attack: Attack, score: Score, answers: Sequence[Recovered], sets: Mapping[str, Score] | None = None
) -> Outcome:
    """Of an attack that recovers text; A0 is what others are held against, so it has no verdict."""
    sets = sets or {}
    verdict = None if attack.id == "A0" else of_sets(score, sets.values())
    return Outcome(attack, "run", verdict, score=score, answers=answers, sets=sets)


def enough(before: Sequence[Outcome]) -> str:
    """Why a further attack on the same text would change no verdict and hardly a figure; "" if it might.

    It is the excess that counts: 95 % of the tokens are little where the prior guesses 94 %.
    """
    done = [
        min((o.score, *o.sets.values()), key=lambda score: score.excess_share.value)
        for o in before
        if o.score is not None and o.attack.id in ("A1", "A2")
    ]
    best = max(done, key=lambda score: score.excess_share.value, default=None)
    if best is None or best.excess_share.value < _ENOUGH:
        return ""
    return (
        f"a simpler attack recovered {best.recovery.value:.1%} already, {best.excess_share.value:.1%} of what the "
        "prior leaves open"
    )


def own(attack: Attack, result: Any) -> Outcome:
    """Of an attack with a result of its own: one, or several of which the worst counts."""
    results = list(result) if isinstance(result, list | tuple) else [] if result is None else [result]
    if not results:
        return Outcome(attack, "not applicable", reason="this plan has nothing that it could be run on")
    plain = [_plain(item) for item in results]
    found = worst(getattr(item, "verdict", Verdict.INCONCLUSIVE) for item in results)
    values = plain[0] if len(plain) == 1 else {"results": plain} | _best(plain)
    said = [item.sentence for item in results if hasattr(item, "sentence")]
    return Outcome(attack, "run", found, " ".join(said), own=values)


def _plain(item: Any) -> dict[str, Any]:
    if hasattr(item, "to_json"):
        return dict(item.to_json())
    return asdict(item) if is_dataclass(item) and not isinstance(item, type) else {"result": str(item)}


def _best(plain: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The attack's best figures, so that every attack has them in one place."""
    withs = [values for values in plain if "excess" in values]
    if not withs:
        return {}
    best = max(withs, key=lambda values: values["excess"])
    return {key: best[key] for key in _FIGURES if key in best}


@dataclass(frozen=True)
class AuditReport:
    """All of an audit.

    Attributes:
        about: Plan, model, seed and scale, as plain values.
        statement: The trust mode in plain words.
        claim: (epsilon, delta), or the reason why there is none.
        self_check: What A1 recovers at k = 1 without any defence; None if there was no time to see.
        findings: What is wrong with the bytes.
        perplexity: "without_defence", "with_defence", "client_alone".
        curves: Name to points.
        examples: Original and reconstructed text; for the page and `report.json`, never for the log.
        seconds: Part to wall seconds.
        curves_missing: A sentence about curves for which there was no time; "" if all were drawn.
        spent: What the run's ledgers say; see `privacy.claims.report_of`.
        notes: Sentences about what was audited that a reader of the verdict has to know.
    """

    about: dict[str, Any]
    statement: str
    claim: str
    self_check: float | None
    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    perplexity: dict[str, float]
    curves: dict[str, list[dict[str, Any]]]
    examples: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    curves_missing: str = ""
    spent: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def skipped(self) -> list[str]:
        """Attacks that should have run, and channels that nothing looked at."""
        missing = [f"{o.name} ({o.reason})" for o in self.outcomes if o.status == "skipped"]
        tried = [o for o in self.outcomes if o.verdict is not None]
        attacked = {o.attack.channel for o in tried if o.attack.id != "A9" and not o.attack.in_use}
        unasked = {o.attack.channel for o in self.outcomes if o.status == "not asked for"} - attacked
        return missing + [f"anything on the {channel} channel" for channel in Channel if channel in unasked]

    @property
    def unasked(self) -> list[str]:
        """Attacks that have something to look at and were not asked for."""
        return [f"{o.attack.id} (not asked for)" for o in self.outcomes if o.status == "not asked for"]

    @property
    def verdict(self) -> Verdict:
        """The worst channel's; that nothing was recovered is said only if all that applies was run."""
        found = [o.verdict for o in self.outcomes if o.verdict is not None]
        found += [finding.verdict for finding in self.findings]
        if self.skipped:
            found.append(Verdict.INCONCLUSIVE)
        verdict = worst(found)
        return Verdict.INCONCLUSIVE if verdict is Verdict.NOT_RECOVERED and self.unasked else verdict

    @property
    def sentences(self) -> list[str]:
        """What goes with the verdict."""
        said = sentences(self.verdict, self.findings, self.unasked + self.skipped)
        if any(outcome.status == "skipped" and TIME_UP in outcome.reason for outcome in self.outcomes):
            which = "all attacks" if any(outcome.verdict for outcome in self.outcomes) else "any attack"
            said.append(f"There was no time for {which}: give more --minutes.")
        short = [one for one in self.outcomes if one.score is not None and one.score.cut_short]
        if any(one.attack.learns for one in short):
            said.append("There was no time for A3 to learn all that it can: give more --minutes.")
        if passes := [one.name for one in short if not one.attack.learns]:
            said.append(f"There was no time for all passes over a text in {', '.join(passes)}: give more --minutes.")
        return [*said, *([self.curves_missing] if self.curves_missing else ()), *self.notes]

    def by_attack(self) -> dict[str, dict[str, Any]]:
        """Attack to channel to figures."""
        found: dict[str, dict[str, Any]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.attack.id, {})[outcome.channel] = outcome.to_json()
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything but text and times: two audits with one seed give the same."""
        return {
            "audit": self.about,
            "statement": self.statement,
            "claim": self.claim,
            "ledgers": list(self.spent),
            "self_check": None if self.self_check is None else round(self.self_check, 6),
            "attacks": self.by_attack(),
            "findings": [finding.sentence for finding in self.findings],
            "perplexity": {key: round(value, 4) for key, value in self.perplexity.items()},
            "curves": self.curves,
            "sentences": self.sentences,
            "verdict": self.verdict.value,
        }
