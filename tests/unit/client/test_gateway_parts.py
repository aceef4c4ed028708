"""The gateway's small parts: errors as HTTP, who may ask, the text of single tokens."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path

import pytest
from starlette.datastructures import Headers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsea import errors
from fedsea.client.gateway.errors import RequestError, response, unforeseen
from fedsea.client.gateway.guard import Guard, check_host
from fedsea.client.gateway.pieces import Pieces
from fedsea.data.prompts import PromptMaker

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.ConfigError("no"), 400, "CONFIG"),
        (errors.SessionTooLarge("no"), 400, "context_length_exceeded"),
        (errors.AuthError("no"), 403, "AUTH"),
        (errors.CapacityError("no", 2.3), 429, "CAPACITY"),
        (errors.TransportError("no"), 503, "TRANSPORT"),
        (errors.SessionLost("no"), 503, "SESSION_LOST"),
        (errors.ProtocolError("no"), 502, "PROTOCOL"),
        (errors.NonFiniteError("no"), 500, "NON_FINITE"),
        (errors.PrivacyError("no"), 403, "PRIVACY"),
        (RequestError("no", 404, param="model", reason="model_not_found"), 404, "model_not_found"),
        (RequestError("no", 401, reason="invalid_api_key"), 401, "invalid_api_key"),
    ],
)
def test_every_error_has_a_status_and_openais_form(error, status, code):
    answer = response(error)
    told = json.loads(answer.body)["error"]
    assert (answer.status_code, told["code"], told["message"]) == (status, code, "no")
    assert told.keys() == {"message", "type", "param", "code"}
    assert answer.headers.get("Retry-After") == ("3" if status == 429 else None)


def documented() -> set[tuple[int, str]]:
    """Status and code of every row of the page's table of errors; "" is no code."""
    page = (ROOT / "docs/how-to/put-your-application-on-it.md").read_text().partition("## Errors")[2]
    rows = re.findall(r"^\| ([0-9, ]+) \| (.+?) \|", page.partition("\n## ")[0], re.M)
    return {
        (int(status), code)
        for statuses, codes in rows
        for status in statuses.split(",")
        for code in re.findall(r"`(\w+)`", codes) or [""]
    }


def refused() -> set[tuple[int, str]]:
    """Status and reason of every `RequestError` in the code that has a reason."""
    found = set()
    for path in (ROOT / "src/fedsea/client/gateway").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RequestError":
                status = next((one.value for one in node.args[1:] if isinstance(one, ast.Constant)), 400)
                words = {word.arg: word.value for word in node.keywords}
                if isinstance(words.get("reason"), ast.Constant):
                    found.add((status, words["reason"].value))
    return found


def kinds(cls: type[errors.FedseaError]) -> list[type[errors.FedseaError]]:
    return [cls, *(one for sub in cls.__subclasses__() for one in kinds(sub) if one.__module__ == errors.__name__)]


def test_the_page_lists_every_error_and_no_other():
    answers = [response(cls("no")) for cls in kinds(errors.FedseaError) if cls is not errors.AggregationError]
    raised = {(answer.status_code, json.loads(answer.body)["error"]["code"]) for answer in answers}
    without_code = {(status, "") for status in (400, 404, 405, 408, 413, 415)}
    assert documented() == raised | refused() | without_code | {(400, "missing"), (400, "invalid_type")}


def test_unforeseen_error_is_logged_by_type_and_place_alone(caplog):
    with caplog.at_level(logging.DEBUG):
        try:
            raise ValueError("nobody-may-read-this")
        except ValueError as error:
            told = unforeseen(error)
    assert "ValueError at test_gateway_parts.py:" in caplog.text
    assert "nobody" not in caplog.text + told.message


@pytest.mark.parametrize("given", ["Bearer key", "bearer  key "])
def test_right_key_is_let_in(given):
    Guard("key").check(Headers({"authorization": given, "host": "anything.example"}))


@pytest.mark.parametrize("given", ["", "key", "Basic key", "Bearer ", "Bearer kez", "Bearer kéy"])
def test_wrong_key_is_not(given):
    with pytest.raises(RequestError) as refused:
        Guard("key").check(Headers({"authorization": given, "host": "127.0.0.1"}))
    assert refused.value.status == 401


def test_without_a_key_only_names_of_this_machine_are_answered():
    for host in ("127.0.0.1:8080", "localhost", "[::1]:8080", "[::1]"):
        Guard(None).check(Headers({"host": host}))
    for host in ("attacker.example:8080", "localhost.attacker.example", "192.0.2.1", ""):
        with pytest.raises(RequestError) as refused:
            Guard(None).check(Headers({"host": host}))
        assert refused.value.status == 403


def test_other_hosts_than_loopback_need_a_key():
    check_host("127.0.0.1", None)
    check_host("0.0.0.0", "key")
    with pytest.raises(errors.ConfigError, match="needs an API key"):
        check_host("0.0.0.0", None)
    with pytest.raises(errors.ConfigError, match="is empty"):
        check_host("127.0.0.1", " ")


@pytest.mark.parametrize("key", ["schlüssel", "s3cret\n", " s3cret", "s3\tcret", "s3\ncret", "s3cret\x00"])
def test_key_that_no_client_could_send_is_refused_without_being_told(key):
    with pytest.raises(errors.ConfigError, match="No client could send") as refused:
        check_host("127.0.0.1", key)
    assert key.strip() not in refused.value.message
    check_host("127.0.0.1", "a key of Words, d1gits & signs!")


def _byte_level() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def _sentence_piece() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "<0xC3>", "<0xA9>", "▁a", "b", "▁"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")][:0], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("make", "tokens", "expected"),
    [
        (_byte_level, ["Ġa", "Ã", "©", "</s>"], [b" a", b"\xc3", b"\xa9", b"</s>"]),
        (_sentence_piece, ["▁a", "b", "<0xC3>", "<0xA9>", "</s>"], [b" a", b"b", b"\xc3", b"\xa9", b"</s>"]),
    ],
    ids=["byte-level", "sentence-piece"],
)
def test_bytes_of_tokens_join_to_the_text(make, tokens, expected):
    tokenizer = make()
    pieces = Pieces(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert [pieces.bytes(token) for token in ids] == expected
    assert pieces.text(ids[0]) == " a"
    assert pieces.text(ids[-2]) == r"\xa9"


def test_earlier_answers_of_a_plain_chat_end_as_in_training():
    tokenizer = _byte_level()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    ids = PromptMaker(tokenizer).chat(turns)
    text = tokenizer.decode(ids)
    assert text == "### User:\na\n\n### Assistant:\nb</s>### User:\nc\n\n### Assistant:\n"


def test_chat_with_a_role_that_is_none_is_refused_without_its_text():
    with pytest.raises(errors.ConfigError, match="message 1") as refused:
        PromptMaker(_byte_level()).chat([{"role": "nobody-may-read-this", "content": "a"}])
    assert "nobody" not in refused.value.message
