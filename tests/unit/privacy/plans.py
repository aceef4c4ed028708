"""Plans with noise, without a model behind them."""

from __future__ import annotations

from typing import Any

from fedsea.plan import FederationPlan, parse_plan

FROZEN = {"input": "frozen", "output": "frozen"}
CLAIMED = {"hidden_std": 4.0, "gradient_std": 8.0, "hidden_clip": 1.0, "gradient_clip": 1.0}


def noised(noise: dict[str, Any] | None = None, **sections: Any) -> FederationPlan:
    """A plan whose clients train nothing of their own, with both channels clipped and noised."""
    values: dict[str, Any] = {
        "model": {"path": "nowhere"},
        "trust": {"mode": "noised"},
        "adapter": FROZEN,
        "noise": CLAIMED if noise is None else noise,
        "clients": [{"name": "a"}],
    }
    return parse_plan(values | sections)
