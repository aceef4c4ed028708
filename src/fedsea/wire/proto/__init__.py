"""Protobuf headers."""
