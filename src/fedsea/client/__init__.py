"""The process at a data owner."""
