"""Nothing in the package or its pages calls text, runs or clients private or anonymous, nor claims DP unless proven."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsea.plan import FederationPlan, backward_channel, parse_plan, server_statement, trust_statement
from fedsea.privacy.claims import Claim, NoClaim, report_of
from tests.support.wording import claims_in, files, texts

ROOT = Path(__file__).parents[2]


def test_nothing_is_called_private_anonymous_or_dp():
    found = {where: hits for where, text in texts(ROOT) if (hits := claims_in(text))}
    assert not found


def test_every_kind_of_file_of_the_package_and_its_pages_is_read():
    read = {path.relative_to(ROOT) for path in files(ROOT)}
    assert {path.suffix for path in read} >= {".py", ".pyi", ".md", ".j2", ".toml", ".json", ".jsonl", ".proto"}
    assert {Path("README.md"), Path("pyproject.toml"), Path("src/fedsea/assets/plan.toml")} <= read


@pytest.mark.parametrize(
    "claim",
    [
        "Your text stays private.",
        "Training is private, and fast.",
        "The server sees anonymous hidden states.",
        "fedsea anonymises names.",
        "A private federation",
        "No key leaves. Your text is private.",
        "No key ever leaves this machine and so your text is private.",
        "PRIVATE training",
        "Privatised text",
        "semi-private, semiprivate",
        "Your text is pri-\nvate.",
        "> Your text is pri-\n> vate.",
        "pri\u00advate",
        "pri&shy;vate",
        "pri\u200bvate",
        "\uff50\uff52\uff49\uff56\uff41\uff54\uff45",
        "priv\u00e1te",
        "<b>pri</b>vate",
        '<img alt="private training">',
        "**pri**vate, and _private_",
        "pri{# a comment #}vate",
        "pri{{ nothing }}vate",
        "pseudo\u2010anonymous",
        "de-identified notes, unidentifiable people",
        "Differential Privacy",
        "differentially\nprivate",
        "with dp-SGD",
        "two DPs",
        "D.P. training",
        "privacy-\npreserving",
        "It preserves all of your privacy.",
        "Full privacy",
    ],
)
def test_the_search_finds_what_it_is_for(claim):
    assert claims_in(claim)


@pytest.mark.parametrize(
    "fine",
    [
        "The private key never travels.",
        "**private** key",
        "fedsea calls no\nrun private.",
        "private_key.pem",
        "no DP claim: no clip",
        "A pseudonym is\n# no anonymity.",
        "the privacy boundary",
    ],
)
def test_the_search_leaves_what_is_meant_otherwise(fine):
    assert not claims_in(fine)


PLANTED = {
    "README.md": "# Private\n",
    "pyproject.toml": 'description = "private training"\n',
    "src/fedsea/a.py": 'SAID = "Your text is pri" + "vate."\n',
    "src/fedsea/b.py": "def f(x):\n    return f'{x} is ' 'pri' f'vate {x}'\n",
    "src/fedsea/c.py": "x = 1  # no key leaves, and text is\n# private\n",
    "src/fedsea/d.py": 'def f(x):\n    """It is pri-\n    vate."""\n',
    "src/fedsea/audit/report.html.j2": "<p>pri<b>vate</b></p>",
    "src/fedsea/assets/plan.toml": "a = 1  # private\n",
    "src/fedsea/assets/silos/x.jsonl": '{"prompt": "anonymous"}\n',
    "src/fedsea/wire/proto/messages.proto": "// anonym\n",
    "docs/how-to/x.md": "| DP | private |\n",
    "examples/x.py": "print('private')\n",
}


def test_a_claim_is_found_in_whatever_file_it_stands(tmp_path):
    for name, text in PLANTED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = {where.partition(":")[0].removesuffix(" (comments)") for where, text in texts(tmp_path) if claims_in(text)}
    assert found == set(PLANTED)


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
