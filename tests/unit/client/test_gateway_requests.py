"""What a body in OpenAI's form asks for, and what is refused without quoting it."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from fedsea.client.gateway.errors import RequestError
from fedsea.client.gateway.requests import ChatBody, TextBody, choices_of, parse
from fedsea.client.pseudonyms import Prompt

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "m", "prompt": "hello"}
SECRET = "nobody-may-read-this"


def chat(**fields):
    return parse(ChatBody, json.dumps(CHAT | fields).encode())


def text(**fields):
    return parse(TextBody, json.dumps(TEXT | fields).encode())


def choices(body, *prompts, max_tokens=100):
    return choices_of(
        body, [Prompt(list(p)) for p in prompts], max_tokens=max_tokens, default_new_tokens=50, stop_tokens=(2,)
    )


def test_fields_that_change_nothing_are_passed_over_and_null_is_as_if_left_out():
    neutral = {"frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "auto", "best_of": 1}
    ignored = {"user": "x", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True}
    assert chat(**neutral, **ignored, seed=None, stop=None, max_tokens=None) == chat()
    assert chat(response_format={"type": "text"}) == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": SECRET}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}]}, "messages"),
        ({"messages": [{"role": SECRET, "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": SECRET, "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"audio": {"voice": SECRET}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [SECRET] * 17}, "stop"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"seed": 2**70}, "seed"),
        ({"stream": SECRET}, "stream"),
        ({"unheard_of": SECRET}, "unheard_of"),
    ],
)
def test_refusal_names_the_field_and_not_the_value(fields, param):
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    assert refused.value.param.startswith(param)
    assert param.split(".")[0] in refused.value.message
    assert SECRET not in refused.value.message + str(refused.value.reason)
    assert refused.value.status == 400


def part(kind):
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: SECRET}]}]}


def turn(**fields):
    return {"messages": [CHAT["messages"][0], {"role": "assistant", "content": None} | fields]}


@pytest.mark.parametrize(
    ("fields", "param", "reason", "sentence"),
    [
        (part("image_url"), "messages.0.content.1.type", "unsupported", "type text are supported"),
        (part("input_audio"), "messages.0.content.1.type", "unsupported", "type text are supported"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_type", "a list of parts"),
        ({"messages": [{"role": "user", "content": [SECRET]}]}, "messages.0.content.0", "model_type", "an object"),
        ({"messages": [SECRET]}, "messages.0", "model_type", "an object"),
        (turn(), "messages.1.content", "invalid_type", "a text or a list of parts"),
        (turn(tool_calls=[{"id": SECRET}]), "messages.1.tool_calls", "unsupported", "Tools are not"),
        (turn(function_call={"name": SECRET}), "messages.1.function_call", "unsupported", "Tools are not"),
        ({"stop": [SECRET] * 17}, "stop", "too_long", "at most 16"),
        ({"stop": "x" * 257}, "stop", "string_too_long", "at most 256"),
        ({"stop": ["a", ""]}, "stop.1", "string_too_short", "at least 1"),
        ({"stop": ["a", 5]}, "stop.1", "string_type", "valid string"),
        ({"stop": {"a": SECRET}}, "stop", "invalid_type", "a text or a list of texts"),
        ({"<text>": SECRET}, "<text>", "unknown", "not known"),
    ],
)
def test_refusal_of_a_field_of_several_forms_is_about_the_one_that_was_meant(fields, param, reason, sentence):
    with pytest.raises(RequestError, match=sentence) as refused:
        chat(**fields)
    assert (refused.value.param, refused.value.reason) == (param, reason)
    assert SECRET not in refused.value.message


@pytest.mark.parametrize(
    ("prompt", "param", "reason"),
    [
        ([1, "a"], "prompt.1", "int_type"),
        (["a", 1], "prompt.1", "string_type"),
        ([[1], "a"], "prompt.1", "list_type"),
        ([[1], [2, "a"]], "prompt.1.1", "int_type"),
        ([1, True], "prompt.1", "int_type"),
        ([1, 2.0], "prompt.1", "int_type"),
        ([True, False], "prompt", "invalid_type"),
        ([{}], "prompt", "invalid_type"),
        (5, "prompt", "invalid_type"),
    ],
)
def test_prompt_of_mixed_or_other_forms_is_refused_where_it_goes_wrong(prompt, param, reason):
    with pytest.raises(RequestError) as refused:
        text(prompt=prompt)
    assert (refused.value.param, refused.value.reason) == (param, reason)


def test_a_list_is_read_up_to_its_first_error():
    with pytest.raises(ValidationError) as refused:
        TextBody.model_validate({"model": "m", "prompt": [1, *["a"] * 1000]})
    assert refused.value.error_count() == 1


@pytest.mark.parametrize("fields", [{"top_p": 0}, {"temperature": 1e-6}, {"temperature": 0, "top_p": 0.5}])
def test_smallest_share_and_temperatures_near_0_take_the_likeliest_token(fields):
    settings = choices(chat(**fields), (5,))[0].settings
    assert (settings.temperature, settings.top_p) == (0, 1)
    assert choices(chat(), (5,))[0].settings.temperature == 1
    how = choices(chat(temperature=1e-4, top_p=0.5), (5,))[0].settings
    assert (how.temperature, how.top_p) == (1e-4, 0.5)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"a"', b"\xff\xfe", b'{"n": Infinity}', b"[" * 100_000])
def test_body_that_is_no_json_object_is_refused(data):
    with pytest.raises(RequestError, match="JSON"):
        parse(ChatBody, data)


def test_content_in_parts_is_joined_and_developers_speak_as_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(
        messages=[{"role": "developer", "content": parts}, {"role": "assistant", "content": "c", "audio": None}]
    )
    assert [message.plain() for message in body.messages] == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


def test_prompts_may_be_one_or_several_texts_or_tokens():
    assert text().prompts == ["hello"]
    assert text(prompt=["a", "b"]).prompts == ["a", "b"]
    assert text(prompt=[5, 6]).prompts == [[5, 6]]
    assert text(prompt=[[5], [6, 7]]).prompts == [[5], [6, 7]]


def test_choices_of_every_prompt_follow_each_other_with_seeds_of_their_own():
    made = choices(text(n=2, seed=9, stop="x", max_tokens=3, logprobs=2), (5,), (6, 7))
    assert [(c.index, c.prompt, c.settings.seed) for c in made] == [
        (0, (5,), 9),
        (1, (5,), 10),
        (2, (6, 7), 11),
        (3, (6, 7), 12),
    ]
    assert {(c.stop, c.settings.num_logprobs, c.settings.stop_tokens) for c in made} == {(("x",), 2, (2,))}


@pytest.mark.parametrize("prompt", ["", [], [""], [[]]])
def test_request_without_a_prompt_is_refused(prompt):
    body = text(prompt=prompt)
    with pytest.raises(RequestError, match="at least one") as refused:
        choices(body, *body.prompts)
    assert refused.value.param == "prompt"


def test_length_is_what_was_asked_for_or_what_there_is_room_for():
    assert choices(chat(), (5,) * 80)[0].settings.max_new_tokens == 20
    assert choices(chat(), (5,) * 10)[0].settings.max_new_tokens == 50
    assert choices(chat(max_tokens=7, max_completion_tokens=8), (5,))[0].settings.max_new_tokens == 8
    assert choices(text(), (5,))[0].settings.max_new_tokens == 16
    for body, prompt in ((chat(max_tokens=21), 80), (chat(), 100), (text(), 101)):
        with pytest.raises(RequestError, match="shorten the prompt") as refused:
            choices(body, (5,) * prompt)
        assert refused.value.reason == "context_length_exceeded"


def test_logprobs_are_off_unless_asked_for():
    assert chat(top_logprobs=3).num_logprobs == -1
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).num_logprobs == 3
    assert text().num_logprobs == -1
    assert text(logprobs=0).num_logprobs == 0
    for value in (True, False):
        with pytest.raises(RequestError, match="valid integer"):
            text(logprobs=value)
