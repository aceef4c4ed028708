"""Pseudonyms: identifiers in a client's text become consistent, realistic surrogates, and originals again in answers.

They bound the damage when the server reconstructs text (which it can); they hide nothing else, and what is not
recognised stays as it is. `fedsea pseudonyms recall` says how much that is.

opening.py      from a client's settings to `Pseudonyms`
pseudonyms.py   replacing and restoring
recogniser.py   what is an identifier: patterns.py, dates.py, names.py, and the client's own words
lexicon.py      names that are known, and from which surrogates are drawn
surrogates.py   realistic surrogates by a keyed function; checksums.py, urls.py
table.py        what stands for what; restoring.py puts originals back while an answer grows
vault.py        the mapping on disk, sealed; keys.py
spans.py        places in a text; typography.py reads its blanks and dashes
"""

from fedsea.privacy.pseudonyms.opening import open_pseudonyms
from fedsea.privacy.pseudonyms.pseudonyms import Pseudonyms, ReplacedText
from fedsea.privacy.pseudonyms.restoring import Restorer

__all__ = ["Pseudonyms", "ReplacedText", "Restorer", "open_pseudonyms"]
