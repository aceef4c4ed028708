"""Opening the federation's model for use: whose segments are used, and what is refused."""

from __future__ import annotations

import re
import threading

import pytest
import torch

from fedsea.client import results, setup
from fedsea.client.causal_lm import SplitCausalLM
from fedsea.client.inference import open_decoder
from fedsea.errors import ConfigError, TransportError
from fedsea.model.passes import TrunkPasses
from tests.support.federation import DEADLINE_S, Watch

PROMPT = [5, 6, 7, 8]


def _logits(options, **how):
    with open_decoder(options, **how) as opened, opened.decoder.open(8) as sequences:
        assert opened.name == "a"
        assert opened.tokenizer.decode(opened.tokenizer("b")["input_ids"]).endswith("b")
        return sequences.extend([PROMPT])[0]


def test_opened_decoder_is_the_federations_model(federation, base_model):
    """What is exported, in plain peft on the whole model, gives the same logits; base segments give others."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fed = federation("a")
    fed.start_server(exit_when_finished=False)
    fed.start_client("a").finish()
    options = fed.client_options("a", data=())
    results.export_adapter(options, fed.folder / "exported")
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), str(fed.folder / "exported"))
    with torch.no_grad():
        expected = whole(torch.tensor([PROMPT])).logits[0, -1]
    told = []
    torch.testing.assert_close(_logits(options, tell=told.append), expected, rtol=1e-4, atol=1e-5)
    assert told == [f"reaching the server {fed.address}", setup.CHECKING, setup.LOADING]
    assert not torch.allclose(_logits(options, base=True), expected, rtol=1e-4, atol=1e-5)


class Halt(Watch):
    """Holds a client after its second step, in the middle of a round."""

    def __init__(self):
        super().__init__()
        self.there, self.go = threading.Event(), threading.Event()

    def step(self, report):
        if report.step == 1:
            self.there.set()
            assert self.go.wait(DEADLINE_S)


def test_answers_of_a_trunk_that_is_behind_the_run_in_the_middle_of_a_round_are_said_to_be(federation, caplog):
    """Client and server are at one step, but sessions see the trunk as it was when the round began."""
    fed, halt = federation("a"), Halt()
    fed.start_server()
    client = fed.start_client("a", halt)
    assert halt.there.wait(DEADLINE_S)
    try:
        _logits(fed.client_options("a", data=()))
    finally:
        halt.go.set()
    assert re.search(r"is at step [12] and the server's trunk that answers here at step 0", caplog.text)
    client.finish()


def test_without_a_run_the_base_model_must_be_asked_for(federation):
    fed = federation("a")
    fed.start_server()
    options = fed.client_options("a", data=())
    with pytest.raises(ConfigError, match="--base"):
        _logits(options)
    assert _logits(options, base=True).dim() == 1


def test_plan_without_inference_is_refused_at_once(federation):
    fed = federation("a", inference={"enabled": False})
    fed.start_server()
    with pytest.raises(ConfigError, match=r"inference\.enabled"):
        _logits(fed.client_options("a"), base=True)


def test_an_evaluation_that_a_server_which_is_there_does_not_answer_ends(federation, monkeypatch):
    fed, hung, original = federation("a"), threading.Event(), TrunkPasses.evaluate
    fed.start_server()
    monkeypatch.setattr(TrunkPasses, "evaluate", lambda *args: hung.wait(30.0) and original(*args))
    options = fed.client_options("a", data=(), answer_within_s=0.4)
    try:
        with open_decoder(options, base=True) as opened, pytest.raises(TransportError, match="did not answer in"):
            SplitCausalLM.of(opened)(torch.tensor([PROMPT]))
    finally:
        hung.set()
