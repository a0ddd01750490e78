"""ε for people: rounded against us, never in our favour."""

from __future__ import annotations

import math


def up(value: float) -> str:
    """Three decimals, rounded up: for ε that was spent."""
    return f"{math.ceil(value * 1e3) / 1e3:.3f}" if math.isfinite(value) else "∞"


def down(value: float) -> str:
    """Three decimals, rounded down and not below 0: for ε that is left."""
    return f"{math.floor(max(value, 0.0) * 1e3) / 1e3:.3f}"
