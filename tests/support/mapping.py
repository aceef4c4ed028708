"""Mappings of pseudonyms whose secret is fixed, so that a test draws the same surrogates every time."""

from __future__ import annotations

from pathlib import Path

from fedsea.privacy.pseudonyms.keys import KeyFile
from fedsea.privacy.pseudonyms.vault import Contents, Vault


def make_mapping(folder: Path, owner: str = "clinic", name: str = "pseudonyms.map") -> None:
    """Begin a mapping, with its key beside it, unless there is one."""
    path, key = folder / name, folder / f"{name}.key"
    if not path.exists() and not key.exists():
        vault = Vault(path, KeyFile(key), owner)
        vault.open()
        with vault.locked():
            vault.write(Contents(bytes(32), []))
