"""Greedy text from a split model is the text that the whole model generates."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsea.client import setup
from fedsea.client.generation import greedy
from fedsea.client.local_trunk import LocalTrunk
from fedsea.model import adapters
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_trunk
from fedsea.privacy.boundary import Boundary
from fedsea.types import BlockRange


def test_greedy_text_is_the_whole_models(federation, base_model):
    plan = federation("a").plan
    checkpoint = open_checkpoint(str(base_model))
    trunk = load_trunk(checkpoint, BlockRange(1, 4), dtype=torch.float32)
    adapters.attach(trunk, plan.adapter, plan.adapter.trunk, plan.seed)
    segments = setup.load_segments(plan, checkpoint, "a", "cpu")
    boundary = Boundary("trusted-server")
    prompt = AutoTokenizer.from_pretrained(base_model)("the old ship")["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(base_model)
    expected = whole.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = expected[0, len(prompt) :].tolist()
    found = greedy(segments, LocalTrunk(trunk, plan, "a"), boundary, prompt, max_new_tokens=12)
    assert found == expected
    stop = expected[5]
    stopped = greedy(segments, LocalTrunk(trunk, plan, "a"), boundary, prompt, max_new_tokens=12, stop=stop)
    assert stopped == expected[: expected.index(stop)]
