"""Ids and targets: the boundary between prompt and completion, beginnings and ends, cuts, and chats."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsea.errors import ConfigError, DataError
from fedsea.types import IGNORE

ROW = {"instruction": "Say hi.", "output": "Hi"}


def test_loss_is_on_the_completion_and_its_end_alone(silo, spoken):
    (sequence,) = silo([ROW]).train()
    text, targets = spoken(sequence)
    assert text == "<s>### Instruction:\nSay hi.\n\n### Response:\nHi</s>"
    assert targets == "·" * len("### Instruction:\nSay hi.\n\n### Response:\n") + "Hi</s>·"


def test_loss_on_all_leaves_out_only_the_beginning(silo, spoken):
    (sequence,) = silo([{"prompt": "ab", "completion": "c"}], loss_on="all").train()
    assert spoken(sequence) == ("<s>abc</s>", "abc</s>·")


def test_the_prompt_is_tokenised_as_it_will_be_asked(silo, make_tokenizer):
    from fedsea.data.templates import instruction_prompt

    tokenizer = make_tokenizer()
    (sequence,) = silo([{"instruction": "i", "input": "x", "output": "o"}]).train()
    asked = tokenizer(instruction_prompt("i", "x"))["input_ids"]
    assert sequence.ids[: len(asked)].tolist() == asked
    assert sequence.targets[len(asked) - 1] == tokenizer("o", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize(
    ("beginning", "text"), [((), "ab</s>"), (("<s>",), "<s>ab</s>"), (("<g>", "<s>"), "<g><s>ab</s>")]
)
def test_a_sequence_begins_as_the_tokenizer_prescribes(silo, make_tokenizer, spoken, beginning, text):
    (sequence,) = silo([{"text": "ab"}], tokenizer=make_tokenizer(beginning), loss_on="all").train()
    assert spoken(sequence)[0] == text
    assert (sequence.targets == IGNORE).sum() == max(1, len(beginning))


def test_a_beginning_and_an_end_that_the_text_brings_are_not_doubled(silo, spoken):
    (sequence,) = silo([{"prompt": "<s>a", "completion": "b</s>"}]).train()
    assert spoken(sequence)[0] == "<s>ab</s>"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(1, 60), max_tokens=st.integers(2, 20))
def test_every_token_of_a_long_text_is_predicted_exactly_once(silo, spoken, length, max_tokens):
    text = "".join(chr(33 + i) for i in range(length))
    pieces = list(silo([{"text": text}], max_tokens=max_tokens).train())
    assert all(2 <= len(piece) <= max_tokens for piece in pieces)
    assert "".join(spoken(piece)[1] for piece in pieces).replace("·", "") == text + "</s>"


def test_other_rows_are_cut_off_at_the_end_and_counted(silo, spoken):
    opened = silo([{"prompt": "abc", "completion": "defgh"}, {"prompt": "a", "completion": "b"}], max_tokens=6)
    assert spoken(next(iter(opened.train()))) == ("<s>abcde", "···de·")
    assert opened.summary().num_truncated == 1


def test_rows_with_nothing_left_to_learn_are_dropped_and_counted_by_reason(silo):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "abcde", "completion": "f"},
        {"prompt": "a", "completion": " "},
    ]
    opened = silo(rows, max_tokens=6)
    summary = opened.summary()
    assert (summary.num_sequences, summary.num_completion_lost, summary.num_empty) == (1, 1, 1)
    assert (summary.num_tokens, summary.num_target_tokens) == (4, 2)
    assert len(summary.warnings()) == 2


def test_a_completion_of_which_one_token_fits_is_kept(silo, spoken):
    (sequence,) = silo([{"prompt": "abcd", "completion": "efg"}], max_tokens=6).train()
    assert spoken(sequence) == ("<s>abcde", "····e·")


def test_a_silo_without_any_usable_row_is_refused_with_the_reason(silo):
    with pytest.raises(DataError, match=r"silo\.jsonl .*max_tokens = 6: 2 of 2 rows read were dropped: their prompt"):
        silo([{"prompt": "a" * 9, "completion": "b"}] * 2, max_tokens=6)


def test_max_tokens_that_the_beginning_fills_is_refused(silo, make_tokenizer):
    with pytest.raises(ConfigError, match="no room"):
        silo([{"text": "a"}], tokenizer=make_tokenizer(("<g>", "<s>")), max_tokens=2)


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


def test_a_chat_template_takes_loss_on_every_assistant_turn(silo, chat_tokenizer, spoken):
    (sequence,) = silo([{"messages": CHAT}], tokenizer=chat_tokenizer).train()
    text, targets = spoken(sequence)
    assert text == chat_tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert targets.replace("·", "") == "a1</s>\na2</s>\n"


def test_a_chat_without_template_uses_the_plain_one(silo, spoken):
    (sequence,) = silo([{"messages": CHAT}]).train()
    text, targets = spoken(sequence)
    assert text == (
        "<s>### System:\nS\n\n### User:\nq1\n\n### Assistant:\na1</s>### User:\nq2\n\n### Assistant:\na2</s>"
    )
    assert targets.replace("·", "") == "a1</s>a2</s>"


def test_turns_that_a_template_renders_unlike_the_last_take_no_loss_and_are_counted(silo, make_tokenizer, spoken):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if loop.last and m['role'] == 'assistant' %}(thought){% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    opened = silo([{"messages": CHAT}], tokenizer=make_tokenizer((), template))
    (sequence,) = opened.train()
    assert spoken(sequence)[1].replace("·", "") == "(thought)a2"
    assert opened.summary().num_masked_turns == 1
    assert "1 assistant turns" in opened.summary().warnings()[0]


def test_a_template_that_prints_the_date_gives_the_same_text_every_day(silo, make_tokenizer, spoken):
    template = "{{ strftime_now('%Y-%m-%d %H:%M') }} {{ date_string }}:{{ messages[0]['content'] }}"
    rows = [{"messages": [{"role": "user", "content": "q"}]}]
    (sequence,) = silo(rows, tokenizer=make_tokenizer((), template), loss_on="all").train()
    assert spoken(sequence)[0] == "26 Jul 2024 26 Jul 2024:q"


def test_a_chat_that_its_template_refuses_is_named_by_line_without_its_text(silo, make_tokenizer):
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('bad ' + messages[0]['content']) }}{% endif %}xy"
    )
    rows = [{"messages": CHAT[1:]}, {"messages": [{"role": "system", "content": "xyzzy-secret"}]}]
    with pytest.raises(DataError, match=r"line 2: the row is refused by the tokenizer's chat template") as caught:
        silo(rows, tokenizer=make_tokenizer((), template), loss_on="all")
    assert "xyzzy" not in str(caught.value)
    opened = silo(rows, tokenizer=make_tokenizer((), template), loss_on="all", on_bad_row="skip")
    assert (opened.summary().num_bad, opened.summary().num_sequences) == (1, 1)


def test_a_python_tokenizer_works_like_a_rust_one(silo):
    from transformers import ByT5Tokenizer

    (sequence,) = silo([{"prompt": "ab", "completion": "c"}], tokenizer=ByT5Tokenizer(extra_ids=0)).train()
    assert sequence.ids.tolist() == [100, 101, 102, 1]
    assert sequence.targets.tolist() == [IGNORE, 102, 1, IGNORE]
