"""Formats are recognised by their columns, or named by the user; what does not fit is refused."""

from __future__ import annotations

import pytest

from fedsea.data import DataFormat
from fedsea.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": "t", "id": 1}, "text"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"instruction": "i", "input": "x", "output": "o", "text": "all of it"}, "instruction"),
        ({"instruction": "i", "context": "x", "response": "o"}, "instruction"),
        ({"question": "q", "answer": "a"}, "instruction"),
        ({"messages": CHAT}, "chat"),
    ],
)
def test_recognised_columns(silo, row, name):
    assert silo([row]).format.name == name


@pytest.mark.parametrize(
    ("row", "data_format"),
    [
        ({"q": "i", "a": "o"}, DataFormat("instruction", {"instruction": "q", "response": "a"})),
        ({"question": "i", "a": "o"}, DataFormat("instruction", {"response": "a"})),
        ({"q": "i", "a": "o"}, DataFormat(fields={"instruction": "q", "response": "a"})),
    ],
)
def test_columns_named_by_role_are_read_like_recognised_ones(silo, row, data_format):
    (wanted,) = silo([{"instruction": "i", "output": "o"}]).train()
    (got,) = silo([row], "named.jsonl", format=data_format).train()
    assert got.ids.tolist() == wanted.ids.tolist()


def test_chat_keys_named_by_role_are_read_like_recognised_ones(silo):
    (wanted,) = silo([{"messages": CHAT}]).train()
    turns = [{"from": m["role"], "value": m["content"]} for m in CHAT]
    data_format = DataFormat("chat", {"messages": "turns", "role": "from", "content": "value"})
    (got,) = silo([{"turns": turns}], "named.jsonl", format=data_format).train()
    assert got.ids.tolist() == wanted.ids.tolist()


def test_the_decided_format_opens_the_same_silo_again(silo):
    rows = [{"instruction": "i", "context": "x", "response": "o"}]
    first = silo(rows)
    again = silo(rows, "again.jsonl", format=first.format)
    assert [s.ids.tolist() for s in again.train()] == [s.ids.tolist() for s in first.train()]


def test_an_input_that_only_later_rows_have_is_not_lost(silo, spoken):
    rows = [{"instruction": "i", "output": "o"}, {"instruction": "i", "context": "seen", "output": "o"}]
    assert "### Input:\nseen\n\n" in spoken(list(silo(rows).train())[1])[0]


def test_a_mixed_file_is_refused_at_its_first_other_row(silo):
    with pytest.raises(DataError, match=r"line 2: the row has nothing in 'text'"):
        silo([{"text": "t"}, {"messages": CHAT}])


def test_a_wanted_format_that_the_columns_do_not_have_is_refused(silo):
    with pytest.raises(DataError, match=r"line 1: .*prompt \+ completion"):
        silo([{"text": "t"}], format=DataFormat("prompt_completion"))


def test_a_named_column_that_is_missing_is_refused(silo):
    with pytest.raises(DataError, match="line 1: the row has no column 'body'"):
        silo([{"text": "t"}], format=DataFormat("text", {"text": "body"}))


def test_roles_of_no_format_are_refused_with_those_that_there_are(silo):
    with pytest.raises(ConfigError, match=r"No format has the role or roles txet.*; there are text: text; "):
        silo([{"text": "t"}], format=DataFormat(fields={"txet": "text"}))


def test_unknown_formats_and_roles_are_refused():
    with pytest.raises(ConfigError, match="no data format"):
        DataFormat("poem")
    with pytest.raises(ConfigError, match="no role prompt"):
        DataFormat("text", {"prompt": "p"})


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "list of messages"),
        ([], "list of messages"),
        (["hello"], "as message 1"),
        ([*CHAT, {"role": "user"}], r"number 3\), which has nothing in 'content'"),
        ([{"role": "user", "content": 7}], "type int"),
        ([{"role": "wizard", "content": "x"}], "message 1 that is not system, user or assistant"),
    ],
)
def test_messages_of_another_shape_are_refused_by_line(silo, messages, says):
    with pytest.raises(DataError, match=f"line 2: .*{says}"):
        silo([{"messages": CHAT}, {"messages": messages}])
