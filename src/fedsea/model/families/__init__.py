"""What differs between model families: a family that the generic rules fit needs no entry here."""

from fedsea.model.families.base import Family
from fedsea.model.families.registry import family_of, refusal

__all__ = ["Family", "family_of", "refusal"]
