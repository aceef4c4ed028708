"""Addresses of the net: nothing of one is in its surrogate, and surrogates that hold something are out of use."""

from __future__ import annotations

import random
import re
import string
from pathlib import Path

import pytest

from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.privacy.pseudonyms.keys import KeyFile
from fedsea.privacy.pseudonyms.recogniser import Recogniser
from fedsea.privacy.pseudonyms.surrogates import SurrogateMaker
from fedsea.privacy.pseudonyms.urls import url_parts
from fedsea.privacy.pseudonyms.vault import Contents, Entry, Vault
from tests.support.mapping import make_mapping

NESTED = "https://klinik-nord.org/patient/AnnaSchmidt?next=https://login.klinik-nord.org/anna"
FRAME = {"www", "example", "org"}


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + "äöüß", k=rng.randrange(3, 11)))


def _url(rng: random.Random, depth: int = 0) -> str:
    """An address with one or more others in its path or query, with users, ports and oddities of writing."""
    start = rng.choice(["https://", "HTTP://", "ftp://", "www.", *(["file:///", "Word-https://"] if not depth else [])])
    user = f"{_word(rng)}:{_word(rng)}@" if rng.random() < 0.2 and "://" in start else ""
    host = f"{_word(rng)}.{_word(rng)}{rng.choice(['', ':8080'])}"
    rest = rng.choice(["/", "?q=", "#", "/?tel:"])
    for _ in range(rng.randrange(4)):
        inner = _url(rng, depth + 1) if depth < 2 and rng.random() < 0.5 else _word(rng)
        rest += inner + rng.choice(["/", "&to=", "-", "_", "%20", "'", ":", "=@"])
    return f"{start.replace('Word', _word(rng))}{user}{host}{rest}{_word(rng)}"


def _words(url: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[^\W\d_]{3,}", url)}


def test_no_word_of_host_path_or_query_is_in_the_surrogate():
    rng, recogniser = random.Random(3), Recogniser(PseudonymSettings(), Path())
    maker = SurrogateMaker(bytes(32), recogniser.lexicon, recogniser.names)
    nested = 0
    for _ in range(400):
        url = _url(rng)
        text = f"See {url} please."
        (span,) = recogniser.find(text)
        assert text[span.start : span.end] == url
        surrogate = maker.base("url", url, 0)
        scheme = url_parts(url).scheme
        assert surrogate.startswith(scheme)
        assert (_words(url.removeprefix(scheme)) - FRAME) & _words(surrogate.removeprefix(scheme)) == set(), url
        nested += url.count("://") > 1
    assert nested > 100


@pytest.mark.parametrize(
    ("url", "form"),
    [
        (NESTED, r"https://[a-z]+\.example\.org/[a-z]{7}/[A-Z][a-z]{3}[A-Z][a-z]{6}\?[a-z]{4}=[a-z]{5}://[a-z.-]+/[a-z]+"),
        ("www.a.org/to?u=http://b.org/anna", r"www\.[a-z]+\.example\.org/[a-z]{2}\?[a-z]=[a-z]{4}://[a-z.]+/[a-z]{4}"),
        ("https://a.org:8080/b", r"https://[a-z]+\.example\.org:8080/[a-z]"),
        ("https://a.org?tel:0301234567", r"https://[a-z]+\.example\.org\?[a-z]{3}:(?!0301234567)\d{10}"),
        ("https://:80", r"https://[a-z]+\.example\.org:80"),
    ],
)  # fmt: skip
def test_a_surrogate_keeps_scheme_port_and_form(opened, url, form):
    pseudonyms = opened()
    replaced = pseudonyms.prompt(f"Siehe {url} dort.")
    assert re.fullmatch(form, replaced.surrogates[0]), replaced.surrogates
    assert pseudonyms.restored(replaced.text) == f"Siehe {url} dort."


@pytest.mark.parametrize(
    ("url", "old"),
    [
        (NESTED, "https://klinik-nord.org/patient/AnnaSchmidt?next=https://mayr.example.org/owyx"),
        ("https://a.org?tel:0301234567", "https://mayr.example.org:0301234567"),
    ],
)
@pytest.mark.parametrize("mark", ["", "="])
def test_a_surrogate_that_holds_a_part_of_its_address_is_replaced_and_still_restored(
    opened, tmp_path: Path, url: str, old: str, mark: str
):
    make_mapping(tmp_path)
    vault = Vault(tmp_path / "pseudonyms.map", KeyFile(tmp_path / "pseudonyms.map.key"), "clinic")
    contents = vault.open()
    with vault.locked():
        vault.write(Contents(contents.secret, [Entry("url", f"{mark}{url}", old, {url: old})]))
    first = opened()
    replaced = first.prompt(f"Siehe {url} dort.")
    assert not _words(url.removeprefix("https://")) & _words(replaced.surrogates[0].removeprefix("https://")) - FRAME
    assert "0301234567" not in replaced.text
    for pseudonyms in (first, opened()):  # before and after it was read from the disk again
        assert pseudonyms.prompt(f"Siehe {url} dort.") == replaced
        assert pseudonyms.restored(f"{old} {replaced.surrogates[0]}") == f"{url} {url}"
        assert pseudonyms.num_entries == 2
