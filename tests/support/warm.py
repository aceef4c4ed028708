"""Imported once by the template process of `tests.support.processes`: what a server or client imports or does first.

Every process that is forked from it would otherwise spend half a second on the first run's lazy imports and caches, and
on copying the memory that the garbage collector touches.
"""

import gc
import logging
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft.tuners.lora  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import fedsea.server.run  # noqa: F401

OF_A_SERVER = frozenset(sys.modules)
"""What is imported where a server runs, for nothing of a client has been so far."""

from fedsea.client import run  # noqa: E402
from tests.support.assets import make_checkpoint  # noqa: E402
from tests.support.federation import Federation  # noqa: E402


def _train_once() -> None:
    """A whole run in this process, without a server: gRPC must not begin before a fork."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_checkpoint(folder / "model")
        once = Federation(folder / "once", model, folder, ("a",), {"training": {"rounds": 1, "steps_per_round": 1}})
        run.train_alone(once.plan_file, "a", once.client_options("a", evaluate=True))


get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions, which peft wants at every first injection
logging.disable(logging.WARNING)
_train_once()
logging.disable(logging.NOTSET)
gc.collect()
gc.freeze()
