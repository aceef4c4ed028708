"""From a row's parts to the text that is tokenised, in segments with and without loss.

The templates are documented in `fedsea.data`. Prompts for generation must be rendered by `instruction_prompt`
or by the same chat template, or the model sees something else than in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsea.data.formats import RowReader
from fedsea.data.rows import RowError, Values

# Templates that print today's date (Llama 3.2, SmolLM3) would give another text tomorrow, and a resumed run
# would not be the same run. So time stands still for them, on the date that Llama 3 has as its default.
_DATE = "26 Jul 2024"
_STILL_CLOCK = "{%- macro strftime_now(format) -%}" + _DATE + "{%- endmacro -%}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text that is tokenised by itself; `target`: the model learns to produce it."""

    text: str
    target: bool
    ends: bool = False
    """EOS follows."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as segments.

    Attributes:
        segments: In order; none if there is nothing to learn.
        begins: Whether what the tokenizer puts before a text comes first.
        cut: Whether a long row becomes pieces; else it is cut off at the end.
        masked_turns: Assistant turns that take no loss because the chat template does not let them be told apart.
    """

    segments: Sequence[Segment]
    begins: bool = True
    cut: bool = False
    masked_turns: int = 0


def instruction_prompt(instruction: str, input_text: str = "") -> str:
    """The prompt of the instruction format, up to where the response begins."""
    middle = f"### Input:\n{input_text}\n\n" if input_text.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def render(values: Values, reader: RowReader, tokenizer: Any) -> Rendered:
    """Put a row into its template.

    Raises:
        RowError: The row does not fit its format, or the tokenizer's chat template refuses it.
    """
    if reader.name == "chat":
        messages = reader.messages(values)
        if getattr(tokenizer, "chat_template", None):
            return _with_chat_template(messages, tokenizer)
        return _plain_chat(messages)
    texts = reader.texts(values)
    if reader.name == "text":
        text = texts["text"]
        return Rendered([Segment(text, True, True)] if text.strip() else [], cut=True)
    if reader.name == "instruction":
        prompt, completion = instruction_prompt(texts["instruction"], texts.get("input", "")), texts["response"]
    else:
        prompt, completion = texts["prompt"], texts["completion"]
    # An empty completion is a gap in the data, not a lesson to stop at once.
    wanted = bool(completion.strip())
    return Rendered([Segment(prompt, False), Segment(completion, wanted, wanted)])


def chat_prompt_segments(messages: Sequence[dict[str, str]], tokenizer: Any) -> Rendered:
    """A conversation up to where the assistant's next turn begins, as training rendered it.

    Raises:
        RowError: The tokenizer's chat template refuses it.
    """
    if getattr(tokenizer, "chat_template", None):
        return Rendered([Segment(_rendered(messages, tokenizer, asking=True), False)], begins=False)
    plain = _plain_chat(messages)
    return Rendered([*plain.segments, Segment(_HEADING.format("Assistant"), False)])


_HEADING = "### {}:\n"


def _plain_chat(messages: Sequence[dict[str, str]]) -> Rendered:
    segments = []
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise RowError(f"has a role in message {number} that is not system, user or assistant")
        heading = _HEADING.format(role.capitalize())
        if role == "assistant" and content.strip():
            segments += [Segment(heading, False), Segment(content, True, True)]
        else:
            segments.append(Segment(f"{heading}{content}\n\n", False))
    return Rendered(segments)


def _with_chat_template(messages: Sequence[dict[str, str]], tokenizer: Any) -> Rendered:
    """Split the rendered chat where the assistant's turns begin and end.

    Both places are found by rendering the chat up to there. A template that renders earlier turns unlike the
    last one (it drops their reasoning, say) hides them: such turns take no loss, and are counted.
    """
    full = _rendered(messages, tokenizer, asking=False)
    segments: list[Segment] = []
    done = masked = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:number], tokenizer, asking=True) if number else ""
        upto = _rendered(messages[: number + 1], tokenizer, asking=False)
        if not before or not full.startswith(upto) or not upto.startswith(before) or len(before) < done:
            masked += 1
            continue
        segments += [Segment(full[done : len(before)], False), Segment(full[len(before) : len(upto)], True)]
        done = len(upto)
    segments.append(Segment(full[done:], False))
    return Rendered([segment for segment in segments if segment.text], begins=False, masked_turns=masked)


def _rendered(messages: Sequence[dict[str, str]], tokenizer: Any, *, asking: bool) -> str:
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _STILL_CLOCK + template
        text: str = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=asking,
            date_string=_DATE,
        )
    except Exception:  # noqa: BLE001 (templates raise what they like, and their messages may hold the text)
        raise RowError("is refused by the tokenizer's chat template; check the order of its roles") from None
    return text
