"""fedsea: fine-tune and use one large language model together without sharing data."""

__version__ = "0.1.0"
