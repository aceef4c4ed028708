"""From a client's settings to its pseudonyms."""

from __future__ import annotations

from pathlib import Path

from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.privacy.pseudonyms.keys import KeyFile, KeySource, Passphrase
from fedsea.privacy.pseudonyms.pseudonyms import Pseudonyms
from fedsea.privacy.pseudonyms.recogniser import Recogniser
from fedsea.privacy.pseudonyms.vault import Vault


def open_pseudonyms(
    settings: PseudonymSettings, folder: Path, owner: str = "", key: KeySource | None = None
) -> Pseudonyms:
    """Open a client's mapping; one is begun if there is none.

    Args:
        settings: See `PseudonymSettings`.
        folder: Where relative paths of the settings begin: the settings file's.
        owner: Name of the client; "" does not look at whose mapping it is.
        key: Where the mapping's key comes from, if not where the settings say.

    Raises:
        ConfigError: A package, a file or the key is missing, or the mapping belongs to another key or client.
        StorageError: The mapping is truncated or was altered.
    """
    mapping = folder / settings.mapping
    if key is None:
        key = Passphrase() if settings.passphrase else KeyFile(folder / (settings.key or f"{settings.mapping}.key"))
    return Pseudonyms(Recogniser(settings, folder), Vault(mapping, key, owner), settings.restore)
