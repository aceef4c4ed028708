"""The model and silos that ship with the package: small, loadable, fluent, made by the scripts in this repository."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedsea

ASSETS = Path(fedsea.__file__).parent / "assets"
SCRIPTS = Path(__file__).parents[2] / "scripts"
SILOS = ("clinic", "bank", "law-office")
LARGEST_BYTES = 5_000_000
IN_DOMAIN = (
    "Message for the library:\nHello, this is Anna Mills from Port Mary. The reading room is too noisy since Monday. "
    "I am sorry to trouble you. Can you help?\n\nReply:\n"
    "Dear Anna,\nthank you for telling us that the reading room is too noisy. The reason is that"
)


def manifest() -> dict:
    return json.loads((ASSETS / "silos" / "manifest.json").read_text(encoding="utf-8"))


def rows(silo: str) -> list[dict[str, str]]:
    lines = (ASSETS / "silos" / f"{silo}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "model", local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        ASSETS / "model", local_files_only=True, dtype=torch.float32, low_cpu_mem_usage=True
    ).eval()


def loss(model, tokenizer, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_assets_stay_below_five_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= LARGEST_BYTES


@pytest.mark.parametrize("silo", SILOS)
def test_silo_has_the_bytes_of_its_manifest(silo):
    entry = manifest()["files"][f"{silo}.jsonl"]
    content = (ASSETS / "silos" / f"{silo}.jsonl").read_bytes()
    assert (hashlib.sha256(content).hexdigest(), content.count(b"\n")) == (entry["sha256"], entry["rows"])


@pytest.mark.parametrize("silo", SILOS)
def test_every_silo_row_is_a_prompt_with_a_completion(silo):
    assert all(set(row) == {"prompt", "completion"} and all(row.values()) for row in rows(silo))


@pytest.mark.parametrize("silo", SILOS)
def test_no_silo_row_repeats(silo):
    texts = [row["prompt"] + row["completion"] for row in rows(silo)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("silo", SILOS)
def test_no_slot_of_a_template_is_left_unfilled(silo):
    assert not any("{" in row["prompt"] + row["completion"] for row in rows(silo))


@pytest.mark.parametrize("silo", SILOS)
def test_every_silo_row_fits_the_model_context(silo, tokenizer, model):
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows(silo)]
    assert max(lengths) <= model.config.max_position_embeddings


def test_silos_share_few_completion_words():
    words = {silo: {word for row in rows(silo) for word in row["completion"].lower().split()} for silo in SILOS}
    for one in SILOS:
        for other in SILOS:
            if one < other:
                assert len(words[one] & words[other]) / len(words[one] | words[other]) < 0.2


def test_prompt_and_completion_tokenize_apart_as_together(tokenizer):
    for silo in SILOS:
        for row in rows(silo)[:40]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            assert prompt + completion == tokenizer(row["prompt"] + row["completion"])["input_ids"]


def test_tokenizer_gives_back_any_text(tokenizer):
    text = "Größe 12,5 µg 日本語\n\tend"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_tokenizer_and_model_agree(tokenizer, model):
    config = model.config
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        config.vocab_size,
        config.bos_token_id,
        config.eos_token_id,
        config.pad_token_id,
    )


def test_model_leaves_a_trunk_of_four_blocks_when_one_is_cut_at_each_end(model):
    assert model.config.num_hidden_layers - 2 == 4


def test_model_knows_its_own_domain(model, tokenizer):
    assert loss(model, tokenizer, IN_DOMAIN) < 1.6


def test_model_continues_a_reply_with_a_full_sentence(model, tokenizer):
    ids = tokenizer(IN_DOMAIN, return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.split(".")[0].strip() in {
        "a class visits on Monday",
        "a class visits on Tuesday",
        "a class visits on Wednesday",
        "a class visits on Thursday",
        "a class visits on Friday",
        "a class visits on Saturday",
        "a class visits on Sunday",
    }


@pytest.mark.parametrize("silo", SILOS)
def test_silos_are_new_to_the_model(silo, model, tokenizer):
    losses = [loss(model, tokenizer, row["prompt"] + row["completion"]) for row in rows(silo)[:10]]
    assert sum(losses) / len(losses) > 2 * loss(model, tokenizer, IN_DOMAIN)


def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_silos", SCRIPTS / "make_silos.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if importlib.util.find_spec("faker") is not None:
    import faker

    if manifest()["faker"] == faker.VERSION:  # another version knows other names, so other bytes are right there

        def test_the_recipe_makes_the_same_silos_byte_for_byte(tmp_path):
            made = recipe()
            for number, silo in enumerate(made.SILOS):
                made.write(silo, tmp_path, manifest()["seed"] + number)
                assert (tmp_path / f"{silo}.jsonl").read_bytes() == (ASSETS / "silos" / f"{silo}.jsonl").read_bytes()

    def test_another_seed_makes_other_rows():
        made = recipe()
        texts = made.tomllib.loads((made.TEXTS / "clinic.toml").read_text(encoding="utf-8")) | {"rows": 20}
        assert list(made.rows_of(texts, 1)) != list(made.rows_of(texts, 2))

    def test_slots_agree_within_a_row():
        made = recipe()
        texts = {
            "rows": 30,
            "prompt": ["{person} {age:20-90} {what}"],
            "completion": ["{person} {age} {what}"],
            "slots": {"what": ["a", "b", "{^colour} {q:1-9}"], "colour": ["red", "blue"]},
            "cases": [{"colour": ["green", "grey"]}],
        }
        assert all(row["prompt"] == row["completion"] for row in made.rows_of(texts, 0))
