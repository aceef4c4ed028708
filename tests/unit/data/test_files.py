"""Rows are found in every kind of file, and what is wrong with one is said by file and line, never by its text."""

from __future__ import annotations

import csv
import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsea.data import open_silo
from fedsea.data.formats import DataFormat
from fedsea.data.opening import files_sha256
from fedsea.data.text_files import _Quotes
from fedsea.errors import DataError
from fedsea.plan import DataSection

SECRET = "xyzzy-secret"
words = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20)


def texts(silo, tokenizer):
    return [tokenizer.decode(s.ids.tolist(), skip_special_tokens=True) for s in silo.train()]


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"prompt": words, "completion": words.filter(str.strip)}), min_size=1))
def test_jsonl_csv_and_parquet_give_the_same_sequences(silo, tmp_path, rows):
    by_json = silo(rows)
    by_csv = silo(as_csv(rows), "silo.csv")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "silo.parquet", row_group_size=2)
    by_parquet = silo((tmp_path / "silo.parquet").read_bytes(), "silo.parquet")
    wanted = [s.ids.tolist() for s in by_json.train()]
    assert len(wanted) == len(rows)
    assert [s.ids.tolist() for s in by_csv.train()] == wanted
    assert [s.ids.tolist() for s in by_parquet.train()] == wanted


def test_plain_text_is_split_at_blank_lines_only(silo, tokenizer):
    opened = silo("\n\none\ntwo\r\n\r\n  \n\nthree\n", "silo.txt")
    assert texts(opened, tokenizer) == ["one\ntwo", "three"]


def test_several_files_are_one_silo_in_the_order_given(write, tokenizer):
    files = [write([{"text": "a"}, {"text": "b"}], "2.jsonl"), write("text\nc\n", "1.csv"), write("d\n\ne", "0.txt")]
    opened = open_silo(files, tokenizer, DataSection(holdout=0), seed=0)
    assert texts(opened, tokenizer) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.jsonl", '\ufeff{"text": "a"}\n\n  \n{"text": "b"}'),
        ("s.csv", "\ufefftext\r\na\r\n\r\nb\r\n"),
        ("s.csv", "\n\r\ntext\na\nb\n"),
        ("s.tsv", "text\tn\na\t1\nb\t2"),
        ("s.txt", "\ufeffa\n\nb"),
    ],
)
def test_byte_order_marks_blank_lines_and_missing_last_line_ends_are_allowed(silo, tokenizer, name, content):
    assert texts(silo(content, name), tokenizer) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("s.jsonl", '{"text": "a"}\n\n{"text": "xyzzy-secret\n', 3, "ends within its JSON object"),
        ("s.jsonl", '{"text": "a"}\n{"text" "xyzzy-secret"}\n', 2, r"not valid JSON \(column 9\)"),
        ("s.jsonl", '{"text": "a"}\nxyzzy-secret\n', 2, r"not valid JSON \(column 1\)"),
        ("s.jsonl", '{"text": "a"}\n"xyzzy-secret"\n', 2, "not a JSON object"),
        ("s.jsonl", '{"text": "a"}\n{"other": "xyzzy-secret"}\n', 2, "nothing in 'text'"),
        ("s.jsonl", '{"text": "a"}\n{"text": ["xyzzy-secret"]}\n', 2, "type list"),
        ("s.jsonl", '{"text": "a"}\n{"text": "xyzzy-secret\\u0000"}\n', 2, "NUL"),
        ("s.jsonl", '{"text": "a"}\n{"text": "xyzzy-secret\\ud800"}\n', 2, "surrogate"),
        ("s.jsonl", '{"text": "a"}\n{"text": ' + "[" * 100_000 + "\n", 2, "JSON"),
        ("s.jsonl", b'{"text": "a"}\n{"text": "xyzzy-secret \xff"}\n', 2, "UTF-8"),
        ("s.jsonl", '{"text": "xyzzy-secret"}\n'.encode("utf-16"), 1, "NUL"),
        ("s.jsonl", '{"no": "xyzzy-secret"}\n', 1, "no known format"),
        ("s.csv", "text,n\na,1\nxyzzy-secret\nb,2\n", 3, "1 columns, the header has 2"),
        ("s.csv", 'text,n\n"a\nb",1\nxyzzy-secret,1,2\n', 4, "3 columns"),
        ("s.csv", 'text,n\na,1\n"xyzzy-secret"x,2\nb,3\n', 3, "not valid CSV"),
        ("s.csv", 'text,n\na,1\n"xyzzy-secret,2\nb,3\n', 3, "never closed"),
        ("s.csv", "text,text\nxyzzy-secret,1\n", 1, "repeated column names"),
        ("s.csv", "xyzzy-secret\nb\n", 2, "no known format"),
        ("s.csv", "xyzzy-secret;n\na;1\n", 1, r"one column found; is the separator ';'\? Save the file with commas"),
        ("s.csv", "xyzzy-secret\tn\na\t1\n", 1, "is the separator a tab"),
        ("s.tsv", "xyzzy-secret,n\na,1\n", 1, "is the separator ','"),
        ("s.txt", b"a\n\nb\nxyzzy-secret \xff\n\nc\n", 4, "UTF-8"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line_without_its_text(silo, name, content, line, says):
    with pytest.raises(DataError, match=says) as caught:
        silo(content, name)
    assert f"{name}, line {line}: " in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_bad_parquet_rows_are_named_by_row(silo, tmp_path):
    rows = pa.table({"text": pa.array(["a", None, "b"])})
    pq.write_table(rows, tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"s\.parquet, row 2: "):
        silo((tmp_path / "in.parquet").read_bytes(), "s.parquet")


def test_parquet_text_that_is_not_utf8_is_named_by_row(silo, tmp_path):
    raw = pa.array([b"a", b"b", b"\xff"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"row 3: the row is not valid UTF-8"):
        silo((tmp_path / "in.parquet").read_bytes(), "s.parquet")


@pytest.fixture
def parquet(silo, tmp_path):
    """A silo of a parquet table."""

    def parquet(table, **settings):
        pq.write_table(table, tmp_path / "in.parquet")
        return silo((tmp_path / "in.parquet").read_bytes(), "s.parquet", **settings)

    return parquet


NO_PYTHON_VALUE = [
    pa.array([10**18, 1], pa.timestamp("us")),
    pa.array([10**8, 1], pa.date32()),
    pa.array([2, 1], pa.timestamp("us", tz="No/Where")),
]


@pytest.mark.parametrize("column", NO_PYTHON_VALUE, ids=["time", "date", "zone"])
def test_parquet_columns_that_are_not_used_are_not_decoded(parquet, tokenizer, column):
    assert texts(parquet(pa.table({"text": ["a", "b"], "created": column})), tokenizer) == ["a", "b"]


@pytest.mark.parametrize("column", NO_PYTHON_VALUE, ids=["time", "date", "zone"])
def test_a_parquet_value_that_python_cannot_hold_is_a_bad_row(parquet, column):
    with pytest.raises(DataError, match=r"s\.parquet, row 1: the row holds a value that is no text"):
        parquet(pa.table({"text": column}))


def test_repeated_parquet_columns_are_refused_as_those_of_csv_are(parquet):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match=r"s\.parquet has several columns named text; name each once"):
        parquet(table)


def test_a_damaged_parquet_file_is_refused(silo, tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="damaged"):
        silo((tmp_path / "in.parquet").read_bytes()[:-20], "s.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.jsonl", b'{\n{"text": "a"}\n{"text": 1}\n\xff\n{"text": "b"}\n'),
        ("s.csv", b'text,n\nx\na,1\n"q"q,1\n\xff,1\nb,2\n'),
        ("s.txt", b"\xff\nz\n\na\n\nx\0\n\ny\n\xff\n\nb"),
    ],
)
def test_bad_rows_are_skipped_and_counted_when_asked(silo, tokenizer, name, content):
    opened = silo(content, name, on_bad_row="skip")
    assert texts(opened, tokenizer) == ["a", "b"]
    assert opened.summary().num_bad == 3
    assert opened.summary().warnings() == ["3 malformed rows were skipped."]


def test_which_rows_are_good_is_told_from_how_many(silo):
    content = b'{"t": "a", "u": 1}\n{"t": "b", "u": "b"}\n{"t": 1, "u": "c"}\n'
    first, last, again = (
        silo(content, format=DataFormat("text", {"text": column}), on_bad_row="skip") for column in "tut"
    )
    assert first.num_rows == last.num_rows == 2
    assert first.index.sha256() == again.index.sha256() != last.index.sha256()


@pytest.mark.parametrize(
    "bad",
    [
        b'"evil\n\xff\nfake text",3',
        b'"evil\n\0\n""fake\n text",3',
        b'"evil\n' + b"x" * 500 + b'\n"" fake, text\n",3',
        b'"evil" x,"several\nfake text,3\n"',
        b'"\xff",3',
    ],
    ids=["not UTF-8", "NUL", "too long", "bad quotes", "one line"],
)
def test_a_bad_csv_record_is_skipped_to_its_end_and_its_last_line_is_no_row(silo, tokenizer, monkeypatch, bad):
    monkeypatch.setattr("fedsea.data.text_files.MAX_ROW_BYTES", 40)
    opened = silo(b'text,n\na,1\n"b",2\n' + bad + b'\n"c",4\nd,5\n', "s.csv", on_bad_row="skip")
    assert texts(opened, tokenizer) == ["a", "b", "c", "d"]
    assert opened.summary().num_bad == 1


def test_a_bad_csv_record_that_never_ends_leaves_nothing_to_skip_to(silo):
    with pytest.raises(DataError, match=r"s\.csv, line 3: a quote is opened that is never closed"):
        silo(b'text,n\na,1\n"b\n\xff\nfake,3\n', "s.csv", on_bad_row="skip")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(['"', ",", "x", "\n"]), max_size=12).map("".join), st.integers(1, 4))
def test_a_record_is_passed_to_where_the_csv_reader_ends_it(content, piece):
    ends = content.splitlines(keepends=True)
    taken = iter(ends)
    asked = []
    next(csv.reader((asked.append(line) or line for line in taken), strict=False), None)
    quotes = _Quotes(",")
    for number, line in enumerate(ends, start=1):
        for at in range(0, len(line), piece):
            quotes.take(line[at : at + piece].encode())
        if not quotes.open:
            assert len(asked) == number
            return
    assert len(asked) == len(ends)


def test_a_row_longer_than_the_limit_is_skipped_whole(silo, tokenizer, monkeypatch):
    monkeypatch.setattr("fedsea.data.text_files.MAX_ROW_BYTES", 40)
    content = '{"text": "a"}\n{"text": "' + "x" * 500 + '"}\n{"text": "b"}\n'
    assert texts(silo(content, on_bad_row="skip"), tokenizer) == ["a", "b"]


@pytest.mark.parametrize("name", ["s.jsonl", "s.csv", "s.parquet"])
def test_a_file_changed_after_opening_is_refused_at_the_next_read(silo, tmp_path, name, monkeypatch):
    monkeypatch.setattr("fedsea.data.silo.CACHE_BYTES", 0)
    rows = [{"text": "a"}, {"text": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    content = {"s.jsonl": rows, "s.csv": as_csv(rows), "s.parquet": (tmp_path / "in.parquet").read_bytes()}[name]
    opened = silo(content, name)
    os.utime(tmp_path / name, ns=(1, 1))
    with pytest.raises(DataError, match="has changed"):
        list(opened.train())


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("name", ["s.jsonl", "s.txt"])
def test_an_empty_file_is_refused_by_name(silo, name, content):
    with pytest.raises(DataError, match=f"no row in .*{name}"):
        silo(content, name)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_csv_is_refused_by_name(silo, content):
    with pytest.raises(DataError, match=r"s\.csv is empty"):
        silo(content, "s.csv")


def test_a_silo_without_a_row_to_train_on_says_what_became_of_them(silo):
    with pytest.raises(DataError, match=r"max_tokens = 512 and 1 of 3 rows held out: 2 of 2 rows .*turn of the assis"):
        silo([{"messages": [{"role": "user", "content": "hi"}]}] * 3, holdout=0.2)


@pytest.mark.parametrize(
    ("name", "says"), [("no.jsonl", "There is no data file"), ("no.json", "jq"), (".", "is a folder")]
)
def test_files_that_cannot_be_silos_are_refused(tmp_path, tokenizer, name, says):
    with pytest.raises(DataError, match=says):
        open_silo([tmp_path / name], tokenizer, DataSection(), seed=0)


def test_no_file_and_the_same_file_twice_are_refused(write, tokenizer):
    path = write([{"text": "a"}])
    for files, says in (([], "at least one"), ([path, path], "twice")):
        with pytest.raises(DataError, match=says):
            open_silo(files, tokenizer, DataSection(), seed=0)


@pytest.mark.parametrize("name", ["sub/../silo.jsonl", "symbolic.jsonl", "hard.jsonl"])
def test_the_same_file_under_another_name_is_refused(write, tokenizer, tmp_path, name):
    path, other = write([{"text": "a"}]), tmp_path / name
    (tmp_path / "sub").mkdir()
    (tmp_path / "symbolic.jsonl").symlink_to(path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    with pytest.raises(DataError, match=f"named twice, as .*silo.jsonl and as .*{name}"):
        open_silo([path, other], tokenizer, DataSection(), seed=0)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/null"])
def test_what_is_no_regular_file_is_refused_before_anything_is_read(tmp_path, tokenizer, kind):
    path = tmp_path / "silo.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)
    with pytest.raises(DataError, match=r"silo\.jsonl is a pipe or a device; write its rows into a file"):
        open_silo([path], tokenizer, DataSection(), seed=0)
    with pytest.raises(DataError, match="is a pipe or a device"):
        files_sha256([path])
