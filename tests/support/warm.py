"""Imported once by the template process of `tests.support.processes`: everything that a server or client imports."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft.tuners.lora  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import fedsea.server.run

OF_A_SERVER = frozenset(sys.modules)
"""What is imported where a server runs, for nothing of a client has been so far."""

import fedsea.client.run  # noqa: E402, F401

get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions, which peft wants at every first injection
