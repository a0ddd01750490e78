"""Silos of arithmetic that set records aside and answer them."""

from __future__ import annotations

import hashlib

import numpy as np

from securefedcollm.privacy.aside import set_aside
from tests.support.arithmetic import ArithmeticSilo
from tests.support.runs import RecordedSilo

RECORDS = 200
SHARE = 0.2
VALIDATED = {"validation": {"share": SHARE}}


class Asked:
    """Its model answers a record right if the record's number is odd, whatever the adapter."""

    share = SHARE
    parts = None

    def contents(self):
        return [
            (hashlib.sha256(f"{self.name} {i}".encode()).digest(), None) for i in range(RECORDS)
        ]

    def set_aside(self, key):
        self.parts = set_aside(key, [words for words, _ in self.contents()], self.share)

    def aside(self):
        return self.parts

    def right_shares(self, adapter):
        return np.flatnonzero(self.parts) % 2.0

    @property
    def counts(self):
        """(right, wrong) of its records, which nobody else knows."""
        right = self.right_shares(None)
        return int(right.sum()), int(len(right) - right.sum())


class AskedSilo(Asked, ArithmeticSilo):
    """For tests of the loops alone."""


class AskedRecordedSilo(Asked, RecordedSilo):
    """For runs with evidence."""
