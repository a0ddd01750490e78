"""Noise that a test can draw again, for audits that are played on it."""

from __future__ import annotations

from securefedcollm.primitives import sha256
from securefedcollm.privacy.noise import NoiseSource


class Recorded:
    """Reproducible noise: another key for every silo and play."""

    def __init__(self, label):
        self.label, self.count = label, 0

    def __call__(self, name):
        self.count += 1
        return NoiseSource(sha256(f"{self.label} {name} {self.count}".encode()))
