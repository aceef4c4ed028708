"""The gateway, asked by the real `openai` client: a federation on loopback, over mutual TLS."""

from __future__ import annotations

import itertools
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import openai
import pytest
from tokenizers import pre_tokenizers

from fedsea.client.drafters import Drafter, PromptLookup
from fedsea.client.gateway import guard, work
from fedsea.client.gateway.run import Gateway, GatewaySettings, serve
from fedsea.client.inference import OpenedDecoder, open_decoder
from fedsea.data.detokenize import TextStream
from fedsea.errors import ConfigError, TransportError
from fedsea.model.decoding import TrunkDecoder
from tests.support.federation import Federation, ServerThread
from tests.support.opened import open_local

KEY = "a key for tests"
PROMPT = "the tall old grey ship"
CANARY = "ledger-of-the-clerk"


@dataclass
class Bench:
    fed: Federation
    server: ServerThread
    opened: OpenedDecoder
    stack: ExitStack

    def gateway(self, drafter: Drafter | None = None, **settings) -> Gateway:
        values = {"port": 0, "api_key": KEY, "default_new_tokens": 12}
        return self.stack.enter_context(Gateway(self.opened, GatewaySettings(**(values | settings)), drafter))

    def client(self, gateway: Gateway | None = None, key: str = KEY) -> openai.OpenAI:
        url = (gateway or self.gateway()).url
        return self.stack.enter_context(openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60.0))

    def wait_for(self, condition: Callable[[dict], bool]) -> None:
        """Until the server's account of its sessions is as it should be."""
        done = threading.Event()

        def look() -> None:
            if condition(self.server.service.status()["inference"]):
                done.set()
            else:
                self.server._loop.call_later(0.02, look)

        self.server._loop.call_soon_threadsafe(look)
        assert done.wait(30.0), "the server's sessions did not become what the test waits for"


class Gate:
    """Lets through a number of tokens of all answers, and then none until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self._free = threading.Semaphore(free)
        self._open = threading.Event()
        gate = self

        class Held(TextStream):
            def push(self, token_id: int) -> str:
                if not gate._open.is_set() and not gate._free.acquire(blocking=False):
                    gate._open.wait(30.0)
                return super().push(token_id)

        monkeypatch.setattr(work, "TextStream", Held)

    def open(self) -> None:
        self._open.set()


def token_ids(text: str) -> list[int]:
    """As the test model's tokenizer gives them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [4 + letters.index("Ġ" if letter == " " else letter) for letter in text]


@pytest.fixture
def bench(federation) -> Iterator[Callable[..., Bench]]:
    with ExitStack() as stack:

        def make(answer_within_s: float = 120.0, **plan) -> Bench:
            fed = federation("a", **plan)
            server = fed.start_server(exit_when_finished=False)
            options = fed.client_options("a", data=(), answer_within_s=answer_within_s)
            opened = stack.enter_context(open_decoder(options, base=True))
            return Bench(fed, server, opened, stack)

        yield make


def test_a_trunk_in_this_process_is_not_watched(base_model):
    before = set(threading.enumerate())
    with Gateway(open_local(base_model), GatewaySettings(port=0, api_key=KEY)) as gateway:
        assert "fedsea-gateway-watch" not in {thread.name for thread in set(threading.enumerate()) - before}
        assert gateway._connected()
    assert gateway.error is None


def test_answers_whole_and_streamed_are_the_same_and_counted(bench):
    client = bench().client()
    asked = {"model": "test", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 10
    assert whole.usage.prompt_tokens > len(PROMPT)  # a byte is a token, and the headings come with it
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 10
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    assert pieces[-1].usage == whole.usage
    assert all(p.usage is None for p in pieces[:-1])

    asked = {"model": "test", "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
    whole = client.completions.create(**asked)
    assert "".join(p.choices[0].text for p in client.completions.create(**asked, stream=True)) == whole.choices[0].text
    assert whole.usage.prompt_tokens == len(PROMPT)
    same = client.completions.create(**(asked | {"prompt": token_ids(PROMPT)}))
    assert same.choices[0].text == whole.choices[0].text


def test_plain_chat_is_the_form_of_training(bench):
    client = bench().client()
    chat = client.chat.completions.create(
        model="test",
        messages=[
            {"role": "developer", "content": "old"},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
        ],
        max_tokens=8,
        temperature=0,
    )
    text = "### System:\nold\n\n### User:\nx\n\n### Assistant:\n"
    plain = client.completions.create(model="test", prompt=text, max_tokens=8, temperature=0)
    assert chat.choices[0].message.content == plain.choices[0].text


def test_chat_template_of_the_tokenizer_makes_the_prompt_and_may_refuse_it(bench):
    at = bench()
    at.opened.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception(m.content) }}{% endif %}"
        "[{{ m.role }}|{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[assistant|{% endif %}"
    )
    client = at.client()
    asked = {"model": "test", "max_tokens": 6, "temperature": 0}
    chat = client.chat.completions.create(**asked, messages=[{"role": "user", "content": "dog"}])
    plain = client.completions.create(**asked, prompt="[user|dog][assistant|")
    assert chat.choices[0].message.content == plain.choices[0].text
    with pytest.raises(openai.BadRequestError, match="chat template") as refused:
        client.chat.completions.create(**asked, messages=[{"role": "system", "content": CANARY}])
    assert CANARY not in str(refused.value)


def test_stop_strings_end_the_answer_and_are_not_part_of_it(bench):
    client = bench().client()
    asked = {"model": "test", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    full = client.completions.create(**asked).choices[0].text
    stop = full[8:11]
    expected = full[: full.index(stop)]
    whole = client.completions.create(**asked, stop=[stop, "never"], logprobs=0).choices[0]
    assert (whole.text, whole.finish_reason) == (expected, "stop")
    assert len(whole.logprobs.tokens) <= len(expected)
    pieces = [p.choices[0] for p in client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(p.text for p in pieces) == expected
    assert pieces[-1].finish_reason == "stop"


def test_logprobs_are_of_the_tokens_that_came_and_streamed_ones_are_the_same(bench):
    client = bench().client()
    asked = {"model": "test", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(content) == 6
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(other.logprob for other in token.top_logprobs) <= 0  # greedy took the likeliest
        assert token.bytes == token.top_logprobs[0].bytes
    streamed = [
        token
        for piece in client.chat.completions.create(**asked, stream=True)
        for token in (piece.choices[0].logprobs.content if piece.choices[0].logprobs else ())
    ]
    assert streamed == content
    told = client.completions.create(model="test", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2)
    logprobs = told.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    assert logprobs.text_offset[0] == 0
    assert sorted(logprobs.text_offset) == logprobs.text_offset
    assert all(0 < len(top) <= 2 for top in logprobs.top_logprobs)


def test_logprobs_of_completions_hold_the_chosen_token_and_its_place_in_the_text(bench):
    client = bench().client()
    asked = {"model": "test", "prompt": PROMPT, "max_tokens": 60, "temperature": 2, "seed": 1, "logprobs": 1}
    choice = client.completions.create(**asked).choices[0]
    found = choice.logprobs
    chosen = list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))
    assert all(top[token] == logprob for token, logprob, top in chosen)
    assert max(len(top) for *_, top in chosen) == 2, "not only the likeliest ones were chosen"
    assert any(len(token) > 1 for token in found.tokens), "there are tokens with a part of a character alone"
    places = itertools.pairwise(zip(found.tokens, found.text_offset, strict=True))
    whole = [(token, at) for (before, _), (token, at) in places if len(before) == len(token) == 1]
    assert whole
    assert all(choice.text[at] == token for token, at in whole)
    streamed = [piece.choices[0].logprobs for piece in client.completions.create(**asked, stream=True)]
    assert [at for piece in streamed if piece for at in piece.text_offset] == found.text_offset


def test_choices_are_each_their_own_and_a_seed_gives_them_again(bench):
    client = bench().client()
    asked = {"model": "test", "prompt": [PROMPT, "dog"], "max_tokens": 12, "n": 2, "seed": 7}
    first, again = client.completions.create(**asked), client.completions.create(**asked)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 4
    assert first.usage.prompt_tokens == len(PROMPT) + len("dog")
    assert first.usage.completion_tokens == sum(48 // 4 for _ in texts)
    streamed = [""] * 4
    for piece in client.completions.create(**asked, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == texts


def test_choices_of_a_streamed_chat_each_begin_with_the_role_and_end_with_the_reason(bench):
    client = bench().client()
    asked = {"model": "test", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, "n": 2, "seed": 7}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({piece.id for piece in pieces}) == 1
    assert (pieces[-1].choices, pieces[-1].usage) == ([], whole.usage)
    for number, choice in enumerate(whole.choices):
        mine = [p.choices[0] for p in pieces[:-1] if p.choices[0].index == number]
        assert [p.delta.role for p in mine] == ["assistant", *[None] * (len(mine) - 1)]
        assert [p.finish_reason for p in mine] == [*[None] * (len(mine) - 1), "length"]
        assert "".join(p.delta.content or "" for p in mine) == choice.message.content


def test_models_health_and_metrics(bench):
    at = bench()
    gateway = at.gateway(model_name="notes")
    client = at.client(gateway)
    assert [model.id for model in client.models.list()] == ["notes"]
    assert client.models.retrieve("notes").id == "notes"
    client.completions.create(model="notes", prompt=PROMPT, max_tokens=3)
    root = gateway.url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    assert httpx.get(f"{root}/metrics").status_code == 401
    metrics = httpx.get(f"{root}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert 'fedsea_gateway_requests_total{route="/v1/completions",status="200"} 1.0' in metrics
    assert f'fedsea_gateway_tokens_total{{kind="prompt"}} {float(len(PROMPT))}' in metrics


REFUSED = {
    "wrong model": ({"model": "gpt"}, openai.NotFoundError, "called test"),
    "no model": ({"model": None}, openai.BadRequestError, "model"),
    "too hot": ({"temperature": 3}, openai.BadRequestError, "temperature"),
    "too long": ({"max_tokens": 127}, openai.BadRequestError, "shorten the prompt"),
    "empty": ({"prompt": ""}, openai.BadRequestError, "empty"),
    "no prompt": ({"prompt": []}, openai.BadRequestError, "no prompt"),
    "no prompt, streamed": ({"prompt": [], "stream": True}, openai.BadRequestError, "no prompt"),
    "empty stop": ({"stop": ""}, openai.BadRequestError, "stop"),
    "not a token": ({"prompt": [5, 4000]}, openai.BadRequestError, "none of the model's, which are 0 to 259"),
    "below every token": ({"prompt": [5, -1]}, openai.BadRequestError, "none of the model's, which are 0 to 259"),
    "too many": ({"n": 40, "prompt": ["a", "b"]}, openai.BadRequestError, "choices"),
    "not offered": ({"echo": True}, openai.BadRequestError, "echo is not supported"),
    "misspelt": ({"extra_body": {"max_token": 3}}, openai.BadRequestError, "max_token: this field"),
}


def test_what_cannot_be_answered_is_refused_in_openais_form(bench):
    at = bench()
    gateway = at.gateway(max_body_bytes=2000)
    client = at.client(gateway)
    for name, (change, kind, sentence) in REFUSED.items():
        with pytest.raises(kind, match=sentence) as refused:
            client.completions.create(**({"model": "test", "prompt": CANARY, "max_tokens": 3} | change))
        assert refused.value.body["type"] == "invalid_request_error", name
        assert CANARY not in str(refused.value), name
    for fields in ({"tools": [{"type": "function"}]}, {"messages": [{"role": "tool", "content": CANARY}]}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                **({"model": "test", "messages": [{"role": "user", "content": "a"}]} | fields)
            )
        assert CANARY not in str(refused.value)
    with pytest.raises(openai.APIStatusError, match="2000 bytes") as refused:
        client.completions.create(model="test", prompt="a" * 3000)
    assert refused.value.status_code == 413
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        at.client(gateway, key="another").models.list()
    with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {KEY}"}) as plain:
        assert plain.post("/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
        for body in (b"{", b"[]", b'{"model": NaN}', b"\xff", b"[" * 5000):
            answer = plain.post("/completions", content=body[:2000], headers={"Content-Type": "application/json"})
            assert (answer.status_code, "error" in answer.json()) == (400, True)
        assert plain.get("/nothing").json()["error"]["type"] == "invalid_request_error"
        assert "/v1/chat/completions" in plain.get("/nothing").json()["error"]["message"]
        answer = plain.get("/completions")
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_without_a_key_only_this_machine_is_answered(bench):
    at = bench()
    gateway = at.gateway(api_key=None)
    assert httpx.get(f"{gateway.url}/models").status_code == 200
    assert httpx.get(f"{gateway.url}/models", headers={"Host": "attacker.example:80"}).status_code == 403
    with pytest.raises(ConfigError, match="needs an API key"):
        Gateway(at.opened, GatewaySettings(host="0.0.0.0", port=0))
    port = httpx.URL(gateway.url).port
    with pytest.raises(ConfigError, match="cannot listen"):
        Gateway(at.opened, GatewaySettings(port=port))


def test_32_requests_at_once_finish_and_each_is_the_answer_of_one_alone(bench):
    at = bench()
    client = at.client(at.gateway(most_running=16))
    prompts = [f"{PROMPT} {'dog ' * (number % 7)}{number}" for number in range(32)]

    def ask(prompt: str) -> str:
        return client.completions.create(model="test", prompt=prompt, max_tokens=10, temperature=0).choices[0].text

    alone = [ask(prompt) for prompt in prompts[:4]]
    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(ask, prompts))
    assert together[:4] == alone
    at.wait_for(lambda inference: inference["sessions"] == inference["pages"] == 0)


def test_drafts_change_no_answer_that_is_greedy_or_has_a_seed(bench):
    at = bench()
    plain, drafting = at.client(at.gateway()), at.client(at.gateway(PromptLookup()))
    for how in ({"temperature": 0}, {"seed": 3, "top_p": 0.9}):
        asked = {"model": "test", "prompt": f"{PROMPT} {PROMPT} {PROMPT}", "max_tokens": 20, "n": 2, **how}
        texts = [[choice.text for choice in one.completions.create(**asked).choices] for one in (plain, drafting)]
        assert texts[0] == texts[1]


def test_more_requests_than_may_wait_are_told_when_to_come_back(bench, monkeypatch):
    at, gate = bench(), Gate(monkeypatch, free=0)
    client = at.client(at.gateway(most_running=1, most_waiting=1))
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.completions.create, model="test", prompt="a", max_tokens=9, n=2)
        at.wait_for(lambda inference: inference["sessions"] == 1)
        with pytest.raises(openai.RateLimitError, match="waiting") as refused:
            client.completions.create(model="test", prompt="a", max_tokens=1)
        gate.open()
        assert len(first.result().choices) == 2
    assert int(refused.value.response.headers["Retry-After"]) >= 1


def test_a_request_with_more_choices_than_could_ever_run_is_refused_as_wrong(bench):
    at = bench()
    client = at.client(at.gateway(most_running=1, most_waiting=1))
    with pytest.raises(openai.BadRequestError, match="2 is the most"):
        client.completions.create(model="test", prompt="a", max_tokens=1, n=3)


def test_server_without_room_is_told_as_429(bench):
    at = bench(inference={"max_sequences": 1})
    with at.opened.decoder.open(8) as others:
        others.extend([[5]])
        client = at.client(at.gateway(first_s=0.5))
        with pytest.raises(openai.RateLimitError, match="no room"):
            client.completions.create(model="test", prompt="a", max_tokens=2)
    assert client.completions.create(model="test", prompt="a", max_tokens=2).choices


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
def test_a_request_for_which_the_server_never_has_room_is_refused_as_too_long(bench, monkeypatch, streams):
    original = TrunkDecoder.bytes_for

    def bytes_for(self, num_sequences: int, max_tokens: int) -> int:
        return 1 << 40 if max_tokens > 30 else original(self, num_sequences, max_tokens)

    monkeypatch.setattr(TrunkDecoder, "bytes_for", bytes_for)
    client = bench().client()
    asked = {"model": "test", "prompt": "a", "stream": streams}
    with pytest.raises(openai.BadRequestError, match=r"inference\.kv_memory_mb") as refused:
        client.completions.create(**asked, max_tokens=40)
    assert refused.value.body["code"] == "context_length_exceeded"
    assert client.completions.create(**(asked | {"stream": False}), max_tokens=2).choices


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
def test_a_server_that_is_there_and_does_not_answer_holds_no_thread_for_ever(bench, monkeypatch, streams):
    at = bench(answer_within_s=0.4)
    client, original = at.client(at.gateway(most_running=1)), TrunkDecoder.run
    asked = {"model": "test", "prompt": "a", "max_tokens": 4}
    client.completions.create(**asked)
    hung, calls = threading.Event(), itertools.count()

    def run(*args):
        if next(calls) == 1:  # after the prompt, so that a stream has begun
            hung.wait(30.0)
        return original(*args)

    monkeypatch.setattr(TrunkDecoder, "run", run)
    try:
        with pytest.raises(openai.APIError, match=r"did not answer in 0\.4 s"):
            list(client.completions.create(**asked, stream=streams))
    finally:
        hung.set()
    assert client.completions.create(**asked).choices  # the thread is free, and the server is back


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
def test_who_leaves_frees_the_sessions_at_once(bench, monkeypatch, streams):
    at, gate = bench(), Gate(monkeypatch, free=2)
    gateway = at.gateway()
    body = json.dumps({"model": "test", "prompt": "a", "max_tokens": 50, "stream": streams, "n": 3}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", httpx.URL(gateway.url).port)) as connection:
        connection.sendall(head.encode() + body)
        at.wait_for(lambda inference: inference["sessions"] == 3)
    at.wait_for(lambda inference: inference["sessions"] == inference["pages"] == 0)  # while the gate is still shut
    gate.open()
    assert at.client(gateway).completions.create(model="test", prompt="a", max_tokens=2).choices


def test_lost_server_is_told_and_an_answer_goes_on_when_it_is_back(bench, monkeypatch):
    at = bench()
    gateway = at.gateway()
    client = at.client(gateway)
    asked = {"model": "test", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    undisturbed = client.completions.create(**asked).choices[0].text
    gate = Gate(monkeypatch, free=5)
    stream = iter(client.completions.create(**asked, stream=True))
    text = next(stream).choices[0].text
    at.server.stop()
    health = gateway.url.replace("/v1", "/health")
    for _ in range(2000):
        if (status := httpx.get(health).status_code) == 503:
            break
    assert status == 503
    gate.open()
    at.fed.start_server(exit_when_finished=False)
    assert text + "".join(piece.choices[0].text for piece in stream) == undisturbed


def test_answers_under_way_are_told_when_the_gateway_ends_and_nobody_is_warned(bench, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fedsea")
    at, gate = bench(), Gate(monkeypatch, free=0)
    gateway = at.gateway()
    client = at.client(gateway)
    with ThreadPoolExecutor(2) as threads:
        whole = threads.submit(client.completions.create, model="test", prompt="a", max_tokens=9)
        at.wait_for(lambda inference: inference["sessions"] == 1)
        caplog.clear()
        ended = threads.submit(gateway.__exit__)
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            whole.result()
        gate.open()
        ended.result()
    assert refused.value.status_code == 503
    at.wait_for(lambda inference: inference["sessions"] == inference["pages"] == 0)
    assert [record.levelname for record in caplog.records if "shutting down" in record.message] == ["INFO"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_body_that_does_not_come_is_not_waited_for(bench, monkeypatch):
    monkeypatch.setattr(guard, "_BODY_S", 0.2)
    port = httpx.URL(bench().gateway(api_key=None).url).port
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30.0) as connection:
        connection.sendall(f"{head}Content-Length: 9\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_nothing_of_a_text_reaches_a_log_or_a_metric(bench, caplog):
    at = bench()
    gateway = at.gateway()
    client = at.client(gateway)
    with caplog.at_level(logging.DEBUG):
        for logger in ("openai", "httpx", "httpcore"):
            logging.getLogger(logger).setLevel(logging.WARNING)  # the other side's
        answer = client.completions.create(model="test", prompt=CANARY, max_tokens=20).choices[0].text
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="test", prompt=CANARY * 50, max_tokens=20)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="test", messages=[{"role": CANARY, "content": CANARY}])
    assert CANARY not in caplog.text
    assert answer not in caplog.text
    assert CANARY not in gateway.metrics.text().decode()


def test_service_says_when_it_is_ready_and_ends_in_good_order(federation):
    fed = federation("a")
    fed.start_server(exit_when_finished=False)
    until, urls = threading.Event(), []

    def ready(gateway: Gateway) -> None:
        urls.append(gateway.url)
        assert httpx.get(f"{gateway.url}/models").json()["data"][0]["id"] == "test"
        until.set()

    serve(fed.client_options("a", data=()), GatewaySettings(port=0), base=True, until=until, on_ready=ready)
    with pytest.raises(httpx.ConnectError):
        httpx.get(urls[0])


def test_service_ends_with_the_reason_when_the_server_is_lost_for_good(federation):
    fed = federation("a")
    server = fed.start_server(exit_when_finished=False)
    options = fed.client_options("a", data=(), retry_for_s=0.2)
    with pytest.raises(TransportError, match="Gave up"):
        serve(options, GatewaySettings(port=0), base=True, until=threading.Event(), on_ready=lambda _: server.stop())
