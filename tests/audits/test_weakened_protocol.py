"""``audit protocol`` catches builds whose aggregation was weakened in the product's own code."""

from __future__ import annotations

from itertools import count

import pytest
from securefedcollm_audits.protocol import cohort, key_attacks, silo_attacks

from securefedcollm.aggregation.masking import keys
from securefedcollm.aggregation.masking.silo import SiloRound
from securefedcollm.primitives import sha256


def test_mask_seeds_of_32_bits_are_caught_however_they_are_folded(monkeypatch):
    monkeypatch.setattr(key_attacks, "BIRTHDAY", 1 << 17)  # enough for these two, and faster
    real = keys.self_mask_key
    for fold in (lambda s: s[:4] + bytes(28), lambda s: sha256(s)[:4] + bytes(28)):
        monkeypatch.setattr(keys, "self_mask_key", lambda s, *rest, f=fold: real(f(s), *rest))
        outcome = key_attacks.narrow_seed()
        assert not outcome.held
        assert "masks repeat" in outcome.learnt[0]


def test_a_seed_with_32_random_bits_is_caught(monkeypatch):

    class Narrow(SiloRound):
        """The seed is the third of the secrets that a silo draws."""

        def __init__(self, *, random, **more):
            drawn = count(1)
            super().__init__(
                random=lambda n: random(n) if next(drawn) != 3 else random(n)[:4] + bytes(n - 4),
                **more,
            )

    monkeypatch.setattr(cohort, "SiloRound", Narrow)
    assert not key_attacks.narrow_seed().held


@pytest.mark.parametrize("case", [key_attacks.middleman, silo_attacks.bad_signatures])
def test_keys_that_nobody_signed_are_caught(monkeypatch, case):
    assert case().held
    monkeypatch.setattr("securefedcollm.aggregation.checks.verify", lambda *any_signature: None)
    monkeypatch.setattr("securefedcollm.aggregation.attendance.verify", lambda *any_signature: None)
    assert not case().held
