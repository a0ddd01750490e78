"""Canaries through the whole real path do not refute the claim; without the noise they do.

The second half gives the first its weight: the same test on the same path fails as soon as honest
silos leave their noise shares out.
"""

from __future__ import annotations

import pytest
from securefedcollm_audits.canaries import canary_scores
from securefedcollm_audits.lower_bounds import audit_scores

from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.silo_unit import Setting, SiloUnit

DELTA = 1e-5
SETTING = Setting(values=4000, field_bound=2**22, least_survivors=7, colluders=1)
HONEST, ROUNDS = 6, 30
UNIT = SiloUnit(SETTING, noise_multiplier=1.0, clip_norm=0.5)


def scores(noiseless=0):
    return canary_scores(
        SETTING, UNIT, silos=8, rounds=ROUNDS, label="canaries", noiseless=noiseless
    )


@pytest.fixture(scope="module")
def claimed():
    return claim([UNIT.event()], DELTA).epsilon


def test_canaries_do_not_refute_the_claim(claimed):
    present, absent = scores()
    assert (len(present), len(absent)) == (HONEST * ROUNDS, (4000 - HONEST) * ROUNDS)
    assert present.mean() == pytest.approx(1.0, abs=0.2)  # the canaries are in the sum
    assert absent.std() == pytest.approx(1.0, rel=0.02)  # and so is the noise of six shares
    assert 1.0 < audit_scores(present, absent, DELTA).epsilon < claimed


def test_canaries_refute_it_when_five_of_six_honest_noise_shares_are_missing(claimed):
    assert audit_scores(*scores(noiseless=HONEST - 1), DELTA).epsilon > claimed
