"""Logging, metrics, progress."""
