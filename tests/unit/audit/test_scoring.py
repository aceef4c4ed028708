"""Scores and verdicts of answers that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsea.audit.scoring import Score, rouge_l, score, score_sets
from fedsea.audit.targets import Recovered, Secret, Target, chosen
from fedsea.audit.verdict import Verdict, of_score, of_sets

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _ids(text: str) -> torch.Tensor:
    return torch.tensor([LETTERS.index(letter) for letter in text])


def _target(text: str, *secrets: Secret, begins: int = 0) -> Target:
    return Target(text, _ids(text), _ids(text), secrets, begins=begins)


def _score(truths: list[Target], said: list[str], guessed: list[str], **kinds: float) -> Score:
    answers = [Recovered(_ids(text), **kinds) for text in said]  # type: ignore[arg-type]
    return score(truths, answers, [_ids(t) for t in guessed], lambda ids: "".join(LETTERS[i] for i in ids))


def test_recovery_prior_and_excess_are_shares_of_tokens() -> None:
    found = _score([_target("abcdefgh"), _target("ab")], ["abcdexxx", "ab"], ["axxxxxxx", "xb"])
    assert found.recovery.value == pytest.approx(7 / 10)
    assert found.prior.value == pytest.approx(2 / 10)
    assert found.excess.value == pytest.approx(5 / 10)
    assert found.excess_share.value == pytest.approx(5 / 8)
    assert (found.exact, found.num_tokens, found.num_sequences) == (0.5, 10, 2)
    assert found.rouge_l == pytest.approx((5 / 8 + 1) / 2)
    assert found.recovery.low < found.recovery.value < found.recovery.high


def test_what_everybody_knows_is_not_scored() -> None:
    assert _score([_target("abcd", begins=2)], ["abxd"], ["xxxx"]).recovery.value == pytest.approx(1 / 2)


def test_intervals_come_out_the_same_again_and_hold_the_whole_when_all_are_alike() -> None:
    truths = [_target("abcd") for _ in range(6)]
    said = ["abcd", "abcx", "abxx", "axxx", "abcd", "xxxx"]
    first, again = (_score(truths, said, ["xxxx"] * 6) for _ in range(2))
    assert first == again
    alike = _score(truths, ["abxx"] * 6, ["xxxx"] * 6)
    assert alike.recovery.low == alike.recovery.value == alike.recovery.high == 0.5


def test_identifiers_count_letter_by_letter_and_not_where_the_prior_has_them() -> None:
    truths = [_target("callbobnow", Secret("name", "bob")), _target("callannnow", Secret("name", "ann"))]
    found = _score(truths, ["callbobxxx", "callannxxx"], ["xxxxxxxxxx", "xxxxannxxx"])
    assert found.identifiers == {"name": 0.5}
    assert found.num_identifiers == {"name": 2}
    assert of_score(found) is Verdict.EXPOSED


def test_a_good_prior_does_not_hide_a_leak() -> None:
    truths = [_target("abcdefghij") for _ in range(4)]
    found = _score(truths, ["abcdefghij"] * 4, ["abcdefxxxx"] * 4)
    assert found.excess.value == pytest.approx(0.4)
    assert of_score(found) is Verdict.EXPOSED


def test_where_the_prior_leaves_nothing_open_there_is_no_share_of_it() -> None:
    share = _score([_target("abcd"), _target("abcd")], ["abcx", "abcd"], ["abcd"] * 2).excess_share
    assert (share.low, share.value, share.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("said", "guessed", "verdict"),
    [
        ("abcdefxxxx", "axxxxxxxxx", Verdict.EXPOSED),
        ("abcdxxxxxx", "axxxxxxxxx", Verdict.PARTIAL),
        ("axxxxxxxxx", "axxxxxxxxx", Verdict.NOT_RECOVERED),
        ("xxxxxxxxxx", "abcxxxxxxx", Verdict.NOT_RECOVERED),
    ],
)
def test_verdicts_of_known_scores(said: str, guessed: str, verdict: Verdict) -> None:
    truths = [_target("abcdefghij") for _ in range(4)]
    assert of_score(_score(truths, [said] * 4, [guessed] * 4)) is verdict


def test_an_attack_that_could_speak_about_no_token_is_inconclusive() -> None:
    nothing = torch.zeros(4, dtype=torch.bool)
    found = score([_target("abcd")], [Recovered(_ids("abcd"), nothing)], [_ids("abcd")], lambda _: "")
    assert of_score(found) is Verdict.INCONCLUSIVE


def _own(text: str) -> Target:
    return replace(_target(text), own=True)


def test_own_texts_that_are_exposed_are_so_whatever_planted_notes_say() -> None:
    truths = [*(_target("abcdefghij") for _ in range(8)), *(_own("klmnopqrst") for _ in range(8))]
    said = ["axxxxxxxxx"] * 8 + ["klmnopqrxx"] * 8
    given = (truths, [Recovered(_ids(text)) for text in said], [_ids("z" * 10)] * 16, lambda _: "")
    together, sets = score(*given), score_sets(*given)
    assert {name: one.recovery.value for name, one in sets.items()} == {"planted": 0.1, "own texts": 0.8}
    assert of_score(together) is Verdict.PARTIAL
    assert of_sets(together, sets.values()) is Verdict.EXPOSED
    assert score_sets(truths[:8], given[1][:8], given[2][:8], given[3]) == {}  # one set is all there is


def test_an_own_text_that_is_above_the_prior_by_luck_is_no_certain_excess() -> None:
    truths = [*(_target("abcdefghij") for _ in range(8)), _own("klmnopqrst")]
    said = ["xxxxxxxxxx"] * 8 + ["kxxxxxxxxx"]
    given = (truths, [Recovered(_ids(text)) for text in said], [_ids("z" * 10)] * 9, lambda _: "")
    assert of_sets(score(*given), score_sets(*given).values()) is Verdict.NOT_RECOVERED


def test_half_of_a_choice_is_own_texts_as_far_as_there_are_any() -> None:
    planted, own = [_target("a")] * 6, [_own("b")] * 3
    assert chosen([*planted, *own], 4) == [0, 1, 6, 7]
    assert chosen([*planted, *own], 8) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert chosen(planted, 4) == [0, 1, 2, 3]
    assert chosen([*planted[:1], *own], 4) == [0, 1, 2, 3]
    assert chosen(own, 1) == [0]


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    assert rouge_l([1, 2, 3], [1, 2, 3]) == 1.0
    assert rouge_l([3, 2, 1], [1, 2, 3]) == pytest.approx(1 / 3)
    assert rouge_l([], [1]) == 0.0
