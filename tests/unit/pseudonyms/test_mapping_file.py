"""The mapping on disk: sealed, one client's, and refused with the reason when it is not what it should be."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from fedsea.errors import ConfigError, FedseaError, StorageError
from fedsea.plan import load_settings
from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.privacy.pseudonyms import open_pseudonyms
from fedsea.privacy.pseudonyms.keys import KeyFile, Passphrase
from fedsea.privacy.pseudonyms.vault import Vault
from tests.fault.killer import Killer, in_a_process

PHRASE = "correct horse battery"


@pytest.fixture
def made(opened, tmp_path: Path) -> Path:
    opened()(["Frau Anna Schmidt, Tel. 030 901820"])
    return tmp_path / "pseudonyms.map"


def test_mapping_and_key_are_their_owners_alone_and_hold_no_text(made, tmp_path):
    key = tmp_path / "pseudonyms.map.key"
    assert [path.stat().st_mode & 0o777 for path in (made, key)] == [0o600, 0o600]
    data = made.read_bytes()
    assert not any(word in data for word in (b"Anna", b"Schmidt", b"901820"))


def test_another_key_is_refused_and_nothing_is_lost(made, opened, tmp_path):
    key, before = tmp_path / "pseudonyms.map.key", made.read_bytes()
    right = key.read_text()
    key.write_text("ab" * 32)
    with pytest.raises(ConfigError, match="was not made with this key"):
        opened()
    assert made.read_bytes() == before
    key.write_text(right)
    assert opened().num_entries == 3


def test_a_key_that_is_missing_no_key_or_open_to_others_is_refused(made, opened, tmp_path):
    key = tmp_path / "pseudonyms.map.key"
    right = key.read_text()
    for text in ("", "nonsense", "ab" * 31, "ä"):
        key.write_text(text)
        with pytest.raises(ConfigError, match="key"):
            opened()
    key.write_text(right)
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        opened()
    key.unlink()
    with pytest.raises(ConfigError, match="There is no key"):
        opened()
    assert not key.exists()


def test_a_mapping_that_was_lost_is_not_begun_anew_beside_its_key(made, opened):
    made.unlink()
    with pytest.raises(ConfigError, match="restore the mapping from a backup"):
        opened()
    assert not made.exists()


@pytest.mark.parametrize("when", ["before", "middle", "after"])
def test_a_mapping_whose_beginning_was_killed_anywhere_is_begun_at_the_next_start(tmp_path, when):
    states = set()
    for at in range(1, 100):
        path, key = tmp_path / str(at) / "map", tmp_path / str(at) / "key"

        def begin(killer: Killer, path: Path = path, key: Path = key) -> None:
            killer.install()
            Vault(path, KeyFile(key)).open()

        killed = in_a_process(partial(begin, Killer(at, when)))
        states.add((key.exists() and len(key.read_bytes()), path.exists()))
        secret = Vault(path, KeyFile(key)).open().secret
        assert Vault(path, KeyFile(key)).open().secret == secret
        path.unlink()
        with pytest.raises(ConfigError, match="restore the mapping from a backup"):
            Vault(path, KeyFile(key)).open()
        if not killed:
            break
    assert states >= {(False, False), (0, False), (69, False), (69, True)}


def test_a_key_behind_a_link_stays_there_and_is_no_new_one_afterwards(tmp_path):
    (tmp_path / "safe").mkdir()
    target, key = tmp_path / "safe" / "key", tmp_path / "key"
    key.symlink_to(target)
    secret = Vault(tmp_path / "map", KeyFile(key)).open().secret
    assert key.is_symlink()
    assert Vault(tmp_path / "map", KeyFile(key)).open().secret == secret
    (tmp_path / "map").unlink()
    with pytest.raises(ConfigError, match="restore the mapping from a backup"):
        Vault(tmp_path / "map", KeyFile(target)).open()


@pytest.mark.parametrize("mark", ["new ", "    ", "  w ", ""])
def test_a_key_is_read_whatever_is_left_of_its_mark(tmp_path, mark):
    key = tmp_path / "key"
    key.write_text(f"{mark}{'e5' * 32}\n")
    key.chmod(0o600)
    assert KeyFile(key).find(tmp_path / "map", {"kind": "file"}) == bytes.fromhex("e5" * 32)


def test_two_mappings_that_are_begun_with_one_key_are_both_opened_with_it(tmp_path):
    key = tmp_path / "key"

    class Between(KeyFile):
        def settle(self) -> None:
            secrets.append(Vault(tmp_path / "other", KeyFile(key)).open().secret)
            super().settle()

    secrets: list[bytes] = []
    secrets.append(Vault(tmp_path / "map", Between(key)).open().secret)
    assert [Vault(tmp_path / name, KeyFile(key)).open().secret for name in ("other", "map")] == secrets


def test_another_clients_mapping_is_refused(made, opened):
    with pytest.raises(ConfigError, match="that of client clinic, and this is practice"):
        opened("practice")
    assert opened("").num_entries == 3


def test_a_truncated_mapping_is_refused_at_every_length(made, opened):
    data = made.read_bytes()
    for length in [*range(0, 400, 7), *range(400, len(data), 11), len(data) - 1]:
        made.write_bytes(data[:length])
        with pytest.raises(StorageError, match="is truncated"):
            opened()
        assert made.read_bytes() == data[:length]


def test_a_mapping_with_one_bit_changed_anywhere_is_refused(made, opened):
    data = made.read_bytes()
    for at in range(0, len(data), 5):
        made.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(FedseaError, match=r"altered|truncated|no mapping|this key|passphrase|that of client"):
            opened()


def test_an_appended_or_foreign_file_is_refused(made, opened):
    data = made.read_bytes()
    made.write_bytes(data + b"x")
    with pytest.raises(StorageError, match="altered"):
        opened()
    made.write_bytes(b"a,b\n1,2\n")
    with pytest.raises(StorageError, match="no mapping"):
        opened()


def test_a_passphrase_opens_its_mapping_and_no_other(tmp_path):
    path = tmp_path / "map"
    secret = Vault(path, Passphrase(PHRASE)).open().secret
    assert Vault(path, Passphrase(PHRASE)).open().secret == secret
    with pytest.raises(ConfigError, match="was not made with this key: give the passphrase"):
        Vault(path, Passphrase("another long passphrase")).open()
    with pytest.raises(ConfigError, match="passphrase = true"):
        Vault(path, KeyFile(tmp_path / "key")).open()


def test_a_passphrase_comes_from_the_environment_and_must_be_long(tmp_path, monkeypatch):
    settings = PseudonymSettings(enabled=True, passphrase=True)
    monkeypatch.delenv("FEDSEA_PSEUDONYMS_PASSPHRASE", raising=False)
    with pytest.raises(ConfigError, match="FEDSEA_PSEUDONYMS_PASSPHRASE"):
        open_pseudonyms(settings, tmp_path)
    monkeypatch.setenv("FEDSEA_PSEUDONYMS_PASSPHRASE", "short")
    with pytest.raises(ConfigError, match="at least 12"):
        open_pseudonyms(settings, tmp_path)
    monkeypatch.setenv("FEDSEA_PSEUDONYMS_PASSPHRASE", PHRASE)
    one = open_pseudonyms(settings, tmp_path)(["Frau Anna Schmidt"])
    assert open_pseudonyms(settings, tmp_path)(["Frau Anna Schmidt"]) == one
    assert not (tmp_path / "pseudonyms.map.key").exists()


def test_a_mapping_that_another_holds_is_waited_for_and_then_refused(made, tmp_path):
    key = KeyFile(tmp_path / "pseudonyms.map.key")
    with Vault(made, key).locked(), pytest.raises(ConfigError, match="in use by another process"):
        Vault(made, key, wait_s=0.05).open()
    assert Vault(made, key, wait_s=0.05).open().entries


def test_a_mapping_exchanged_under_a_running_process_stops_it(made, opened, tmp_path):
    pseudonyms = opened()
    other = tmp_path / "other"
    other.mkdir()
    open_pseudonyms(PseudonymSettings(enabled=True), other, "clinic")
    for name in ("pseudonyms.map", "pseudonyms.map.key"):
        (tmp_path / name).write_bytes((other / name).read_bytes())
    with pytest.raises(FedseaError, match="was not made with this key"):
        pseudonyms(["Herr Bertold Kowalski"])


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ('patterns = { badge = "(" }', "no regular expression"),
        ('patterns = { badge = "x*" }', "matches the empty text"),
        ('types = ["nmae"]', "pseudonyms.types"),
        ("languages = []", "pseudonyms.languages"),
        ('maping = "x"', "did you mean `mapping`"),
        ('words = ["-"]', "pseudonyms.words"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(tmp_path, table, sentence):
    path = tmp_path / "client.toml"
    path.write_text(f"[pseudonyms]\nenabled = true\n{table}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        load_settings(path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    from fedsea.privacy.pseudonyms import lexicon

    def gone(name: str) -> None:
        raise ModuleNotFoundError(name)

    lexicon.load_lexicon.cache_clear()
    monkeypatch.setattr(lexicon.importlib, "import_module", gone)
    with pytest.raises(ConfigError, match=r'pip install "\.\[pseudonyms\]"'):
        open_pseudonyms(PseudonymSettings(enabled=True), tmp_path)
    assert list(tmp_path.iterdir()) == []
