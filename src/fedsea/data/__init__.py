"""Text to tokens; the client only.

A **silo** is the text of one client: one or more files of the same format, read row by row and never held whole.

Files
    `.jsonl`, `.ndjson`: one JSON object a line; blank lines are allowed.
    `.csv`, `.tsv`: a header line, then records; quoted fields may hold line breaks.
    `.parquet`: read with pyarrow, a row group at a time.
    `.txt`: plain text; documents are separated by blank lines, so a line break inside a document is kept.
    All text is UTF-8 (a byte order mark is skipped); a row is at most 16 MiB.

Formats, with the columns that are recognised by themselves
    `text`: `text`. Loss on every token.
    `prompt_completion`: `prompt`, `completion`. Used as they are: spaces and line breaks between them are yours.
    `instruction`: `instruction`, optionally `input` or `context`, and `output` or `response`; or `question`,
    optionally `context`, and `answer`. Put into the template below.
    `chat`: `messages`, a list of `{"role": …, "content": …}`. Rendered by the tokenizer's chat template, or by the
    plain template below where it has none.
    Other column names are given as `DataFormat("instruction", {"response": "long_answer"})`: role to column. Roles:
    `text`; `prompt`, `completion`; `instruction`, `input`, `response`; `messages`, `role`, `content` (the last two
    name the keys of a message). The first row decides the format; a later row without its columns is an error.

Templates
    Instruction (the input part is left out where it is empty), followed by the response:

        ### Instruction:
        {instruction}

        ### Input:
        {input}

        ### Response:
        {response}

    Chat without a template of the tokenizer's own: `### System:`, `### User:`, `### Assistant:`, in the same way.

Tokens
    A sequence begins with what the tokenizer puts there (BOS, or nothing); EOS ends texts, completions, responses and
    the assistant's turns (with the tokenizer's own chat template, beginning and end are the template's business).
    Prompt and completion are tokenised apart and joined, so the boundary is exact: the prompt's ids are those that
    the model will see when it is asked. With `loss_on = "completion"` loss is taken on the completion and its EOS;
    in a chat on all turns of the assistant. With `loss_on = "all"` it is taken on every token behind the beginning.
    Plain text longer than `max_tokens` is cut into pieces that overlap by one token, so every token is predicted
    once; other rows are cut off at the end, and dropped (and counted) if no token with loss is left.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsea.data.batches import BatchStream, evaluation_batches, pack
    from fedsea.data.encoding import EncodedSequence
    from fedsea.data.formats import DataFormat
    from fedsea.data.opening import open_silo
    from fedsea.data.silo import Sequences, Silo, SiloSummary
    from fedsea.data.templates import instruction_prompt
    from fedsea.data.tokenizer import load_tokenizer

__all__ = [
    "BatchStream",
    "DataFormat",
    "EncodedSequence",
    "Sequences",
    "Silo",
    "SiloSummary",
    "evaluation_batches",
    "instruction_prompt",
    "load_tokenizer",
    "open_silo",
    "pack",
]

_HOMES = {
    "batches": ("BatchStream", "evaluation_batches", "pack"),
    "encoding": ("EncodedSequence",),
    "formats": ("DataFormat",),
    "opening": ("open_silo",),
    "silo": ("Sequences", "Silo", "SiloSummary"),
    "templates": ("instruction_prompt",),
    "tokenizer": ("load_tokenizer",),
}


def __getattr__(name: str) -> object:
    """Each name is imported when it is first used: what checks a command line needs no torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
