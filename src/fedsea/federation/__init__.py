"""Rounds and aggregation: pure maths and state machines."""
