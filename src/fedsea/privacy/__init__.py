"""The only exit of a client: everything that it sends is clipped, charged and noised here, as its plan says.

boundary.py    makes releases, and nothing else does
clip.py        bounds on what one token, sequence or update can change
noise.py       Gaussian noise from a cryptographically secure generator
pricing.py     what a release costs, and whom
ledger.py      the durable account of what was spent; book.py reads it, spent.py adds it up
accountant.py  exact (epsilon, delta) of what was spent
claims.py      what may be claimed of it, or why nothing can be
pseudonyms/    surrogates for identifiers, before text becomes tokens
"""
