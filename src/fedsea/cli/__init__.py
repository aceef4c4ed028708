"""The `fedsea` command."""
