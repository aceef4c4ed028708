"""`SplitCausalLM` over a real server: what was trained together generates, and trains on."""

from __future__ import annotations

import pytest
import torch

import fedsea
from fedsea.client import results
from fedsea.errors import ConfigError
from tests.support.decoding import comes_back_to, held

PROMPT = torch.tensor([[5, 6, 7, 8]])
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def _connect(fed, **options):
    identity = fed.identities / "a"
    return fedsea.SplitCausalLM.connect(fed.address, identity, **{"run": fed.folder / "a", **options})


def test_connected_model_is_the_federations_for_generating_and_for_gradients(federation, base_model):
    """Against what is exported, in plain peft on the whole model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fed = federation("a")
    fed.start_server(exit_when_finished=False)
    fed.start_client("a").finish()
    results.export_adapter(fed.client_options("a", data=()), fed.folder / "exported")
    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_model), str(fed.folder / "exported"), is_trainable=True
    ).eval()
    with _connect(fed) as split:
        assert split.tokenizer.vocab_size > 0
        assert split.tokenizer.padding_side == "left"
        assert split.generate(PROMPT, **SETTINGS).tolist() == whole.generate(input_ids=PROMPT, **SETTINGS).tolist()
        beams = {**SETTINGS, "num_beams": 3}
        assert split.generate(PROMPT, **beams).tolist() == whole.generate(input_ids=PROMPT, **beams).tolist()
        ours, theirs = split(PROMPT, labels=PROMPT), whole(input_ids=PROMPT, labels=PROMPT)
        ours.loss.backward()
        theirs.loss.backward()
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
        expected = {
            name.removeprefix("base_model.model."): parameter.grad for name, parameter in whole.named_parameters()
        }
        trained = [(name, parameter) for name, parameter in split.named_parameters() if parameter.requires_grad]
        assert trained
        for name, parameter in trained:
            other = expected[name.partition("_blocks.")[2]]
            assert (parameter.grad - other).norm() <= 1e-4 * other.norm(), name
    with pytest.raises(ConfigError, match="--base"):
        _connect(fed, run=fed.folder / "none")
    with _connect(fed, run=fed.folder / "none", base=True) as split:
        assert split.generate(PROMPT, **SETTINGS).shape == (1, 16)
        split.generate(PROMPT, guidance_scale=1.5, **SETTINGS)
        assert comes_back_to(fed, (0, 0, 0))
        kept = split(PROMPT, use_cache=True)
        assert held(fed)[0] == len(kept.logits)
    assert comes_back_to(fed, (0, 0, 0))
