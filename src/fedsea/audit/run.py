"""An audit from its options to its report: tap the bytes, check them, attack them, say what came out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedsea.audit import curves as drawn
from fedsea.audit.about import about, examples, notes
from fedsea.audit.applies import inapplicable
from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks import a1_nearest
from fedsea.audit.canaries import Texts
from fedsea.audit.catalogue import ATTACKS, Attack
from fedsea.audit.checks import check_taps
from fedsea.audit.claimed import claimed
from fedsea.audit.knowing import model_of
from fedsea.audit.masking import MakeMember, check_masks
from fedsea.audit.observe import Change, Tap, Tapped
from fedsea.audit.outcome import TIME_UP, AuditReport, Outcome, Status, enough, own, scored
from fedsea.audit.passes import as_mean, passes_of
from fedsea.audit.scoring import score, score_sets
from fedsea.audit.sessions import Use, use
from fedsea.audit.settings import AuditOptions, Clock, Show
from fedsea.audit.subject import Subject, open_subject, variant
from fedsea.audit.targets import Observation, OutOfTime, Target, chosen
from fedsea.audit.verdict import LEAST_SELF_CHECK, Finding, Verdict
from fedsea.errors import ConfigError
from fedsea.federation.secure import Member
from fedsea.privacy.boundary import Boundary
from fedsea.types import Channel, Partition

_SELF_CHECK_SEQUENCES = 4
_SELF_CHECK_TOKENS = 32
_SMALLEST_PART_S = 2.0
_FOR_SELF_CHECK = 0.5
"""Of all time."""
_FOR_CURVES = 0.35
"""Of the time that is left when the attacks begin."""
_UNTIL_IT_STOPS = 0.7
"""Of an attack's time, after which one that trains stops and answers with what it has learned."""
_MEMBERS = 32
"""Texts of the membership attack, half of which are trained on."""
_EVALUATED = 4
"""Texts that are also sent as an evaluation sends them."""
_UPDATES = 2
"""Of one client, as its noise may come again in the next round."""
_ALSO_IN_USE = ("A1", "A2")
"""A5 to A8 need gradients, updates or a training; what A3, A4 and A6 add in use is what they add in training."""
_OPENING = "opening the plan and the model"
_TOO_SHORT = (
    "sessions (inference.max_tokens, or the model's context) are too short for a prompt and its answer: raise "
    "inference.max_tokens, or set inference.enabled = false if nothing is to be generated"
)


def audit(
    options: AuditOptions,
    show: Show = lambda *_: None,
    *,
    boundary: Boundary | None = None,
    change: Change | None = None,
    member: MakeMember = Member,
    clock: Clock | None = None,
) -> AuditReport:
    """Audit a plan or a run.

    Args:
        options: See `AuditOptions`.
        show: Told how far each part is.
        boundary: In the place of the plan's own: a fault that is planted.
        change: Applied to hidden states before the boundary: a defence that is tried out.
        member: In the place of a member of secure aggregation: a fault that is planted.
        clock: The time budget; None makes one of the options.

    Raises:
        FedseaError: Plan, model or texts cannot be used.
    """
    show(_OPENING, 0, 1)
    subject = open_subject(options.path, options.model, options.client, options.settings)
    show(_OPENING, 1, 1)
    clock = clock or Clock(options.minutes or options.scale.minutes, show)
    return _Audit(subject, options, clock, boundary, change, member).run()


class _Audit:
    """One audit under way."""

    def __init__(
        self,
        subject: Subject,
        options: AuditOptions,
        clock: Clock,
        boundary: Boundary | None,
        change: Change | None,
        member: MakeMember,
    ) -> None:
        self._subject, self._options, self._clock = subject, options, clock
        self._scale = options.scale
        self._texts = Texts(subject.tokenizer, subject.plan, self._scale.tokens)
        plan = variant(subject.plan, subject.name)
        self._attacker = drawn.attacker_of(subject, subject.partition, subject.noise_std(), self._texts, options, plan)
        self._knowing = model_of(subject, options.device)
        self._boundary, self._change, self._member = boundary, change, member
        self._seconds: dict[str, float] = {}
        self._used: list[Use] = []
        self._unused: tuple[Status, str] | None = None

    def run(self) -> AuditReport:
        """All parts in order; the time budget is that of attacks, the audit's own check and curves alone."""
        targets = self._targets()
        self._clock.start()
        self_check = self._self_check(targets)
        findings = _of_self_check(self_check)
        with self._clock.stopped():
            self._tap, taps = self._observe(targets)
            tap = self._tap
            used = self._observe_use(tap, targets)
            evaluated = tap.evaluate([targets[i] for i in chosen(targets, _EVALUATED)])
            findings += check_taps(self._subject, taps, self._attacker.codecs, used, evaluated)
            if self._subject.plan.aggregation.secure:
                watch = self._clock.watch("rounds of secure aggregation", ends=False)
                findings += check_masks(self._subject.plan, self._subject.checkpoint, self._member, watch)
            plain_texts = self._plain_texts()
            perplexity = self._perplexity(tap, plain_texts)
        if self._scale.curve_sequences:
            self._clock.reserved_s = _FOR_CURVES * self._clock.left_s
        outcomes = self._attacks(targets)
        self._clock.reserved_s = 0.0
        started = time.monotonic()
        given = self._subject, targets, plain_texts, self._texts, self._options, self._clock
        found, missing = drawn.curves(*given, tap)
        self._seconds["curves"] = time.monotonic() - started
        claim, spent = claimed(self._subject)
        return AuditReport(
            about(self._subject, self._options, self._attacker, targets, self._used),
            tap.boundary.statement,
            claim,
            self_check,
            tuple(outcomes),
            tuple(findings),
            perplexity,
            found,
            examples(targets, outcomes, self._texts),
            {part: round(value, 2) for part, value in self._seconds.items()},
            missing,
            spent,
            notes(self._subject, outcomes, passes_of(self._subject, self._scale.epochs)),
        )

    # --- what is attacked -------------------------------------------------------------------------------------------

    def _targets(self) -> list[Target]:
        targets = self._texts.canaries(self._scale.canaries, self._options.seed)
        if self._options.texts:
            targets += self._texts.of_files(self._options.texts, self._scale.texts)
        return targets

    def _self_check(self, targets: Sequence[Target]) -> float | None:
        """Whether the audit can see what lies open: recovery without any defence at k = 1; None: the time was up."""
        subject = self._subject
        started = time.monotonic()
        blocks = subject.checkpoint.num_blocks
        cut = Partition(min(1, blocks - 1), 0)
        plan = variant(subject.plan, subject.name, partition=cut, hidden_std=0.0, plain_wire=True)
        sent = drawn.fresh(targets[:_SELF_CHECK_SEQUENCES], _SELF_CHECK_TOKENS)
        Tap(plan, subject.checkpoint, subject.name, device=self._options.device).observe(sent)
        attacker = drawn.attacker_of(subject, cut, {}, self._texts, self._options, plan)
        try:
            answers = a1_nearest.run(attacker, sent, self._clock.watch("self-check", _FOR_SELF_CHECK))
        except OutOfTime:
            return None
        finally:
            self._seconds["self-check"] = time.monotonic() - started
        guesses = drawn.guesses_of(attacker, sent)
        return score(sent, answers, guesses, self._texts.decode, self._options.seed).recovery.value

    def _observe(self, targets: Sequence[Target]) -> tuple[Tap, dict[Channel, list[Tapped]]]:
        """What the server sees of all targets in all epochs."""
        started = time.monotonic()
        subject, options = self._subject, self._options
        plan, planted = variant(subject.plan, subject.name), {"boundary": self._boundary, "change": self._change}
        tap = drawn.tap_of(subject, plan, options, options.key("tap"), **planted)
        passes = passes_of(subject, self._scale.epochs)

        def passed(target: Target, observation: Observation, tapped: list[Tapped]) -> None:
            if passes.each > 1:
                target.means.append(as_mean(observation, tapped, plan, passes.each))

        pairs = tap.observe(targets, passes.sent, self._clock.watch("tapping the bytes", ends=False), passed)
        taps: dict[Channel, list[Tapped]] = {Channel.HIDDEN: [pair[0] for pair in pairs]}
        if gradients := [pair[1] for pair in pairs if len(pair) > 1]:
            taps[Channel.GRADIENT] = gradients
        if updates := [update for _ in range(_UPDATES) if (update := tap.tap_update())]:
            taps[Channel.UPDATE] = updates
        self._seconds["tapping"] = time.monotonic() - started
        return tap, taps

    def _observe_use(self, tap: Tap, targets: Sequence[Target]) -> list[Tapped]:
        """What the server sees of prompts and answers, message by message."""
        if not self._subject.plan.inference.enabled:
            self._unused = ("not applicable", "the plan allows no inference")
            return []
        started = time.monotonic()
        try:
            watch = self._clock.watch("prompts and answers", ends=False)
            self._used = use(tap, [targets[i] for i in chosen(targets, self._scale.sessions)], watch)
        except ConfigError as error:
            self._unused = ("not applicable", error.message)
            return []
        if not self._used:
            self._unused = ("skipped", _TOO_SHORT)
            return []
        self._seconds["use"] = time.monotonic() - started
        return [tapped for one in self._used for tapped in one.taps]

    def _plain_texts(self) -> list[Target]:
        """What perplexity is measured on: the user's texts, or else what the public model writes itself."""
        if self._options.texts:
            return self._texts.of_files(self._options.texts, self._scale.texts)
        return [self._texts.of_ids(ids_T) for ids_T in self._sampled("texts for perplexity", self._scale.known, 3)]

    def _sampled(self, what: str, count: int, number: int) -> list[torch.Tensor]:
        """Texts that the public model writes; each number gives others."""
        seed = self._options.seed + number
        return self._attacker.sampled(count, self._scale.tokens, seed, self._clock.watch(what, ends=False))

    def _prepare(self, attack: Attack) -> None:
        """Texts that an attack needs beside what it attacks, made for the first that does; outside of the budget."""
        attacker = self._attacker
        with self._clock.stopped():
            if attack.needs == "public" and not attacker.public:
                attacker.public = self._sampled("public texts", self._scale.public, 2)
            if attack.needs == "known" and not attacker.known:
                known = [self._texts.of_ids(ids_T) for ids_T in self._sampled("known texts", self._scale.known, 1)]
                self._tap.observe(known, progress=self._clock.watch("tapping known texts", ends=False))
                attacker.known = known

    def _perplexity(self, tap: Tap, plain_texts: Sequence[Target]) -> dict[str, float]:
        subject, options = self._subject, self._options
        plan = variant(subject.plan, subject.name)
        without, under = (self._clock.watch(f"perplexity {how} the defence", ends=False) for how in ("without", "with"))
        return {
            "without_defence": drawn.perplexity(subject, plain_texts, options, progress=without, beside=tap),
            "with_defence": drawn.perplexity(subject, plain_texts, options, plan, under, tap),
            "client_alone": tap.perplexity_alone(plain_texts),
        }

    # --- attacks ----------------------------------------------------------------------------------------------------

    def _attacks(self, targets: Sequence[Target]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for attack in ATTACKS:
            started = time.monotonic()
            if not attack.in_use:
                outcomes.append(self._attack(attack, targets, [one for one in outcomes if not one.in_use]))
            if attack.in_use or (attack.id in _ALSO_IN_USE and outcomes[-1].status != "not asked for"):
                outcomes.append(self._attack_in_use(attack, [one for one in outcomes if one.in_use]))
            self._seconds[attack.id] = time.monotonic() - started
        return outcomes

    def _attack_in_use(self, attack: Attack, before: Sequence[Outcome]) -> Outcome:
        """The same on prompts and answers."""
        if self._unused is not None:
            status, reason = self._unused
            return Outcome(attack, status, reason=reason, in_use=True)
        targets = [one.answer if attack.in_use else one.target for one in self._used]
        return replace(self._attack(attack, targets, before), in_use=True)

    def _attack(self, attack: Attack, targets: Sequence[Target], before: Sequence[Outcome]) -> Outcome:
        if reason := inapplicable(self._subject, attack):
            return Outcome(attack, "not applicable", reason=reason)
        wanted = self._options.attacks
        if wanted and attack.id not in wanted and attack.id != "A0":
            return Outcome(attack, "not asked for")
        if attack.needs_more and attack.id not in wanted and self._options.quick and (reason := enough(before)):
            return Outcome(attack, "not needed", reason=reason)
        if self._clock.left_s < _SMALLEST_PART_S and not attack.always:
            return Outcome(attack, "skipped", reason=f"the {TIME_UP}")
        self._prepare(attack)
        self._attacker.budget_s = max(_SMALLEST_PART_S, _UNTIL_IT_STOPS * attack.share * self._clock.left_s)
        try:
            module = attack.load()
        except ModuleNotFoundError:
            return Outcome(attack, "skipped", reason="this version does not have it")
        watch = self._clock.watch(f"{attack.id} {attack.title}", attack.share, ends=not attack.always)
        try:
            planted = {"boundary": self._boundary} if attack.id == "A9" else {}
            answers = module.run(self._who(attack), self._aims(attack, targets), watch, **planted)
        except OutOfTime:
            return Outcome(attack, "skipped", reason=f"its {TIME_UP}")
        if attack.answers == "own":
            return own(attack, answers)
        guesses = (module.guesses if attack.in_use else drawn.guesses_of)(self._attacker, targets)
        given = (targets, answers, guesses, self._texts.decode, self._options.seed)
        return scored(attack, score(*given), answers, score_sets(*given))

    def _who(self, attack: Attack) -> Attacker:
        """Text is recovered by who has what was sent; the prior is public, and other attacks train from the start."""
        if attack.id == "A0" or attack.answers == "own" or not self._subject.sent:
            return self._attacker
        return replace(self._attacker, base=self._knowing)

    def _aims(self, attack: Attack, targets: Sequence[Target]) -> Sequence[Target]:
        """What an attack is run on; membership needs more texts, all made in the same way, and none that was seen."""
        if attack.id == "A8":
            return self._texts.canaries(max(_MEMBERS, self._scale.canaries), self._options.seed + 4)
        return targets


def _of_self_check(recovery: float | None) -> list[Finding]:
    if recovery is None:
        words = "There was no time for the audit's own check, so nobody knows whether it can see: give more --minutes."
        return [Finding(Verdict.INCONCLUSIVE, words)]
    if recovery >= LEAST_SELF_CHECK:
        return []
    words = (
        f"Without any defence A1 recovers {recovery:.1%} of the tokens at k = 1, and an audit that is in order "
        f"recovers at least {LEAST_SELF_CHECK:.0%}."
    )
    return [Finding(Verdict.BROKEN, words)]
