"""Runs with ``privacy.unit: silo``, and what their ledgers were charged."""

from __future__ import annotations

from securefedcollm.federation.plan import silo_unit
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.silo_unit import SiloUnit
from tests.support.arithmetic import SIZE, make_study
from tests.support.rounds import Run

CLIP = 20.0


PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "unit": "silo", "noise": "distributed", "clip_norm": CLIP}


def study(**changes):
    return make_study(privacy=PRIVACY, **changes)


def unit_of(made) -> SiloUnit:
    unit = silo_unit(made, lambda round_: SIZE, 0)
    assert unit is not None
    return unit


def run(directory, made, **options) -> Run:
    return Run(directory, made, private=False, **options)


def charged(directory, name="silo-1"):
    """(round, state, shares that are charged) of every entry."""
    with Ledger(directory / "silos" / name / "ledger.sqlite", name) as ledger:
        return [(e.key.round, e.state, e.counted[0].shares) for e in ledger.entries()]
