"""Nothing in the package or its pages calls text, runs or clients private or anonymous, nor claims DP unless proven."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsea.plan import FederationPlan, backward_channel, parse_plan, server_statement, trust_statement
from fedsea.privacy.claims import Claim, NoClaim, report_of

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")

CLAIMING = re.compile(r"\b(?:private\w*|privately|anonym\w*|pseudo-?anonym\w*)\b", re.IGNORECASE)
ALLOWED = re.compile(
    "|".join(
        (
            r"private[ _-]keys?(?:_pem|_bytes)?\b",  # of a certificate, of a key exchange
            r"\bPrivate(?:Format|Key)\w*",
            r"\bprivate modes\b",  # of files: their owner alone may read them
            r"\bPrivateTmp=",  # systemd's
            r"\breport a vulnerability privately\b",
            r"\bprivate (?:adapters?|LoRA)\b",  # trained parameters that the server does not know
            r"\b(?:no|not|never|nothing|nor)\b[^.;:]{0,60}\b(?:private|anonymous|anonymity)\b",  # said that it is not
            r'"private" and "dp" are kept for\b',
        )
    ),
    re.IGNORECASE,
)
DP = re.compile(r"\bDP\b")
DP_ALLOWED = re.compile(
    r'no DP claim|DP claim: epsilon|\(epsilon, delta\)-DP|is no DP\b|"private" and "dp" are kept for', re.IGNORECASE
)


def texts() -> Iterator[tuple[str, str]]:
    """Where, and what: every string of the package, docstrings too, and every page, page by page."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        if path.name.endswith("_pb2.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value
    pages = [ROOT / name for name in PAGES]
    pages += sorted(path for ending in ("*.md", "*.j2", "*.html") for path in (ROOT / "docs").rglob(ending))
    pages += sorted(path for ending in ("*.md", "*.j2", "*.html") for path in (ROOT / "src").rglob(ending))
    for path in pages:
        if path.exists():
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def claims_in(text: str, claiming: re.Pattern[str], allowed: re.Pattern[str]) -> list[str]:
    """Matches that are no part of an allowed phrase."""
    flat = re.sub(r"\s+", " ", text)
    spans = [match.span() for match in allowed.finditer(flat)]
    return [
        flat[max(0, found.start() - 40) : found.end() + 40]
        for found in claiming.finditer(flat)
        if not any(start <= found.start() and found.end() <= stop for start, stop in spans)
    ]


@pytest.mark.parametrize(("claiming", "allowed"), [(CLAIMING, ALLOWED), (DP, DP_ALLOWED)], ids=["words", "DP"])
def test_nothing_is_called_private_anonymous_or_dp(claiming, allowed):
    found = {where: hits for where, text in texts() if (hits := claims_in(text, claiming, allowed))}
    assert not found


@pytest.mark.parametrize(
    "claim",
    [
        "Your text stays private.",
        "Training is private, and fast.",
        "The server sees anonymous hidden states.",
        "fedsea anonymises names.",
        "A private federation",
        "No key leaves. Your text is private.",
    ],
)
def test_the_search_finds_what_it_is_for(claim):
    assert claims_in(claim, CLAIMING, ALLOWED)


@pytest.mark.parametrize("fine", ["The private key never travels.", "fedsea calls no run private.", "private_key.pem"])
def test_the_search_leaves_what_is_meant_otherwise(fine):
    assert not claims_in(fine, CLAIMING, ALLOWED)


def plans() -> Iterator[FederationPlan]:
    base = {"model": {"path": "x"}, "clients": [{"name": "a"}]}
    for adapter in ({}, {"input": "frozen", "trunk": "frozen", "output": "adapter"}):
        yield parse_plan({**base, "adapter": adapter})
        yield parse_plan({**base, "adapter": adapter, "trust": {"mode": "noised"}, "noise": {"hidden_std": 1.0}})


def test_what_is_said_at_a_start_promises_nothing():
    promising = re.compile(r"\b(?:private|anonym\w*|secure\w*|safe\w*|protect\w*|confidential)\b", re.IGNORECASE)
    for plan in plans():
        for said in (trust_statement(plan, "a"), server_statement(plan)):
            assert said.startswith(f"Trust mode: {plan.trust.mode}.")
            assert re.search("CAN reconstruct|can still reconstruct text", said)
            assert not promising.search(said)


PARAMETERS = "no gradients leave, but this client's trained parameters do in every round"
STEP, ROUND, MASKED, PERSONAL = ({"sync": "step"}, {"sync": "round"}, {"secure": True}, {"sync": "personal"})


@pytest.mark.parametrize(
    ("aggregation", "state", "leaves"),
    [
        (STEP, "closed at the cut", "gradients of this client's own segments leave in every step"),
        (ROUND, "closed", PARAMETERS),
        (MASKED, "closed", f"{PARAMETERS}, in a masked sum"),
        (PERSONAL, "closed", "no gradients leave"),
    ],
)
@pytest.mark.parametrize("noise", [{}, {"hidden_std": 1.0, "update_std": 1.0}], ids=["trusted", "noised"])
def test_a_closed_backward_channel_says_what_leaves_beside_it(aggregation, state, leaves, noise):
    plan = parse_plan(
        {
            "model": {"path": "x"},
            "clients": [{"name": "a"}, {"name": "b"}],
            "adapter": {"input": "frozen", "trunk": "frozen", "output": "full"},
            "aggregation": aggregation,
            "trust": {"mode": "noised" if noise else "trusted-server"},
            "noise": noise,
        }
    )
    said = f" backward channel: {state} ({leaves}; the forward channel still gives text away)."
    assert backward_channel(plan, "a") == backward_channel(plan) == state
    assert trust_statement(plan, "a").endswith(said)
    assert server_statement(plan).endswith(said.replace("this client's", "the clients'"))
    assert report_of(plan, "a", None)["backward_channel"] == state


def test_the_sentence_of_a_claim_says_what_it_is_about_and_that_of_none_says_why():
    claim = Claim(1.5, 1e-5, 0.4, "sequence", "lengths are not covered").sentence()
    assert claim == "DP claim: epsilon = 1.5 at delta = 1e-05 for replacing one sequence (lengths are not covered)"
    assert NoClaim("no clip").sentence() == "no DP claim: no clip"
