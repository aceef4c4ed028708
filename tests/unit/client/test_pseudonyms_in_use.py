"""Pseudonyms on their way through a client: rows, prompts, answers that stream, stop strings, the gateway."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsea.client.gateway.errors import RequestError
from fedsea.client.gateway.requests import TextBody, choices_of, parse
from fedsea.client.pseudonyms import Prompts, note_training, pseudonyms_of
from fedsea.data import BatchStream, open_silo
from fedsea.data.detokenize import TextStream
from fedsea.data.formats import DataFormat
from fedsea.errors import ConfigError, DataError
from fedsea.plan import DataSection, load_settings
from tests.support.mapping import make_mapping
from tests.unit.data.conftest import CHAT_TEMPLATE, byte_tokenizer

ROW = "Frau Anna Schmidt, Tel. 030 901820."
SECRETS = ("Anna", "Schmidt", "901820")


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Path]:
    def write(extra: str = "", enabled: str = "true") -> Path:
        path = tmp_path / "client.toml"
        path.write_text(f"[pseudonyms]\nenabled = {enabled}\n{extra}\n", encoding="utf-8")
        make_mapping(tmp_path)
        return path

    return write


def silo_of(tmp_path: Path, rows: list[Any], rewrite: Any, tokenizer: Any = None, **arguments: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = DataSection(holdout=0, max_tokens=400, loss_on="all")
    return open_silo([path], tokenizer or byte_tokenizer(), section, seed=0, rewrite=rewrite, **arguments)


def texts_of(silo: Any, tokenizer: Any = None) -> list[str]:
    tokenizer = tokenizer or byte_tokenizer()
    return [tokenizer.decode(sequence.ids.tolist(), skip_special_tokens=True) for sequence in silo.train()]


@pytest.mark.parametrize(
    "row",
    [
        {"text": ROW},
        {"prompt": ROW, "completion": f"ok {ROW}"},
        {"instruction": ROW, "input": ROW, "output": ROW},
        {"question": ROW, "context": ROW, "answer": ROW},
        {"messages": [{"role": "system", "content": ROW}, {"role": "user", "content": ROW},
                      {"role": "assistant", "content": ROW}]},
    ],
)  # fmt: skip
def test_no_planted_identifier_reaches_the_tokens_of_any_format(tmp_path, settings, row):
    tokenizer = byte_tokenizer(beginning=(), chat_template=CHAT_TEMPLATE)
    silo = silo_of(tmp_path, [row], pseudonyms_of(settings(), "clinic"), tokenizer)
    (text,) = texts_of(silo, tokenizer)
    assert not [secret for secret in SECRETS if secret in text]
    plain = texts_of(silo_of(tmp_path, [row], None, tokenizer), tokenizer)[0]
    assert plain.count("Frau") == text.count("Frau") == plain.count("Schmidt") > 0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Patient Helena Payne, MRN 4471123. PLAN:", "completion": "Payne, 83 y, 4471123: rest."},
        {"prompt": "Payne, 83 y, 4471123: PLAN:", "completion": "Patient Helena Payne, MRN 4471123, rests."},
        {"messages": [{"role": "user", "content": "Is Payne (4471123) in?"},
                      {"role": "assistant", "content": "Patient Helena Payne, MRN 4471123, is."}]},
    ],
)  # fmt: skip
def test_what_is_an_identifier_in_one_text_of_a_row_is_one_in_all_of_them(tmp_path, settings, row):
    tokenizer = byte_tokenizer(beginning=(), chat_template=CHAT_TEMPLATE)
    other = {key: "Payne came." if key != "messages" else value[:1] for key, value in row.items()}
    silo = silo_of(tmp_path, [row, other], pseudonyms_of(settings(), "clinic"), tokenizer)
    text, alone = sorted(texts_of(silo, tokenizer), key=len, reverse=True)
    assert not re.search("Payne|Helena|4471123", text)
    assert "Payne" in alone  # rows are looked at one by one


def test_a_prompt_has_the_surrogates_of_the_rows(tmp_path, settings):
    tokenizer, path = byte_tokenizer(), settings()
    (row,) = texts_of(silo_of(tmp_path, [{"text": ROW}], pseudonyms_of(path, "clinic")))
    prompts = Prompts(tokenizer, pseudonyms_of(path, "clinic"))
    assert tokenizer.decode(prompts.text(ROW).ids, skip_special_tokens=True) == row
    chat = tokenizer.decode(prompts.chat([{"role": "user", "content": ROW}]).ids, skip_special_tokens=True)
    asked = tokenizer.decode(prompts.instruction(ROW).ids, skip_special_tokens=True)
    assert row in chat
    assert row in asked


def test_what_is_an_identifier_in_one_message_of_a_chat_is_one_in_all_of_them(settings):
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    prompts = Prompts(tokenizer, pseudonyms_of(settings('keep = ["Anna Seghers"]'), "clinic"))
    messages = [
        {"role": "user", "content": "Did Kowalczewska read Anna Seghers?"},
        {"role": "assistant", "content": "Patient Helena Kowalczewska (MRN 4471123, room 12) did."},
        {"role": "user", "content": "Did KOWALCZEWSKA, I mean 4471123, see Helena's ward, or 4471123-5?"},
    ]
    prompt = prompts.chat(messages)
    assert prompt.restore is not None
    sent = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert not re.search("kowalczewska|helena|4471123", sent, re.IGNORECASE)
    assert "Anna Seghers" in sent
    assert "room 12" in sent
    restorer = prompt.restore()
    back = restorer.push(sent) + restorer.finish()
    assert all(message["content"] in back for message in messages)
    alone = prompts.chat(messages[:1])
    assert "Kowalczewska" in tokenizer.decode(alone.ids, skip_special_tokens=True)


def test_a_mapping_lost_with_its_key_is_named_and_no_other_one_begun_for_a_run(tmp_path, settings):
    path, run = settings(), tmp_path / "run"
    run.mkdir()
    mapping = tmp_path / load_settings(path).pseudonyms.mapping
    key = mapping.with_name(f"{mapping.name}.key")

    def lose() -> None:
        mapping.unlink()
        key.unlink()

    lose()
    assert pseudonyms_of(path, "clinic", run) is not None  # a run that has not begun begins its mapping
    note_training(run, path)
    assert pseudonyms_of(path, "clinic", run) is not None
    lose()
    with pytest.raises(ConfigError, match="put the newest copy of it and of its key back"):
        pseudonyms_of(path, "clinic", run)
    assert not mapping.exists()
    assert not key.exists()


def test_a_run_is_resumed_with_its_mapping_and_refused_with_another_or_none(tmp_path, settings):
    rows = [{"text": f"{ROW} Nr. {n}"} for n in range(6)]
    path = settings()
    stream = BatchStream(silo_of(tmp_path, rows, pseudonyms_of(path, "clinic")), seed=0, sequences_per_batch=2)
    stream.next()
    state, following = stream.state(), stream.next().input_ids_T
    again = BatchStream(silo_of(tmp_path, rows, pseudonyms_of(path, "clinic")), seed=0, sequences_per_batch=2)
    again.restore(state)
    assert again.next().input_ids_T.equal(following)
    others = (
        None,
        pseudonyms_of(settings('types = ["name"]'), "clinic"),
        pseudonyms_of(settings('mapping = "new"'), "clinic"),
    )
    for other in others:
        with pytest.raises(DataError, match="data settings"):
            BatchStream(silo_of(tmp_path, rows, other), seed=0, sequences_per_batch=2).restore(state)


def test_an_answer_that_streams_has_its_originals_and_stops_at_the_users_words(settings):
    tokenizer = byte_tokenizer()
    prompts = Prompts(tokenizer, pseudonyms_of(settings(), "clinic"))
    prompt = prompts.text(ROW)
    assert prompt.restore is not None
    raw = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    ids = tokenizer(raw + " Ende", add_special_tokens=False)["input_ids"]
    whole = TextStream(tokenizer, change=prompt.restore())
    assert "".join([*(whole.push(token) for token in ids), whole.finish()]) == f"{ROW} Ende"
    stopped = TextStream(tokenizer, ["Schmidt, Tel"], change=prompt.restore())
    assert "".join([*(stopped.push(token) for token in ids), stopped.finish()]) == "Frau Anna "
    assert stopped.stopped
    surrogate = raw.split()[2].rstrip(",")
    unstopped = TextStream(tokenizer, [surrogate], change=prompt.restore())
    assert "".join([*(unstopped.push(token) for token in ids), unstopped.finish()]) == f"{ROW} Ende"
    assert not unstopped.stopped


def test_a_stop_string_at_the_very_end_is_found_when_what_waited_is_restored(settings):
    tokenizer = byte_tokenizer()
    prompt = Prompts(tokenizer, pseudonyms_of(settings(), "clinic")).text("Frau Anna Schmidt")
    assert prompt.restore is not None
    raw = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    stream = TextStream(tokenizer, ["Schmidt"], change=prompt.restore())
    pieces = [stream.push(token) for token in tokenizer(raw, add_special_tokens=False)["input_ids"]]
    assert "".join([*pieces, stream.finish()]) == "Frau Anna "
    assert stream.stopped


def test_the_gateway_restores_each_choice_by_itself(settings):
    prompts = Prompts(byte_tokenizer(), pseudonyms_of(settings(), "clinic"))
    body = parse(TextBody, json.dumps({"model": "m", "prompt": ROW, "n": 2}).encode())
    made = choices_of(body, [prompts.text(ROW)], max_tokens=500, default_new_tokens=5, stop_tokens=())
    one, other = [choice.restore() for choice in made if choice.restore is not None]
    assert one is not other


def test_token_ids_are_refused_where_identifiers_are_replaced(settings):
    from types import SimpleNamespace

    from fedsea.client.gateway.app import _Routes

    prompts = Prompts(byte_tokenizer(), pseudonyms_of(settings(), "clinic"))
    served = SimpleNamespace(name="m", prompts=prompts, vocab_size=400)
    data = json.dumps({"model": "m", "prompt": [5, 6, 7]}).encode()
    with pytest.raises(RequestError, match="send the text"):
        _Routes(served)._prepare(TextBody, data)  # type: ignore[arg-type]


def test_pseudonyms_are_off_unless_the_settings_say_so_and_anothers_mapping_is_refused(settings, tmp_path):
    assert pseudonyms_of(None, "clinic") is None
    assert pseudonyms_of(settings(enabled="false"), "clinic") is None
    elsewhere = settings('mapping = "elsewhere"', enabled="false")
    assert pseudonyms_of(elsewhere, "clinic") is None
    assert not list(tmp_path.glob("elsewhere*"))
    assert pseudonyms_of(settings(), "clinic") is not None
    with pytest.raises(ConfigError, match="that of client clinic"):
        pseudonyms_of(settings(), "practice")


def test_bad_rows_are_still_named_by_file_and_line(tmp_path, settings):
    with pytest.raises(DataError, match="line 2"):
        silo_of(tmp_path, [{"text": ROW}, {"text": 5}], pseudonyms_of(settings(), "clinic"))
    silo = silo_of(tmp_path, [{"text": ROW}, {"text": 5}], pseudonyms_of(settings(), "clinic"), on_bad_row="skip")
    assert silo.num_rows == 1
    assert silo.format == DataFormat("text", {"text": "text"})
