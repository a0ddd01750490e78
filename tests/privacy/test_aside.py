"""A unit's part follows from the unit and a secret: nothing else moves it, and nobody guesses it.

Adversary: whoever adds a record to learn of another one; the author of a second study; a reader.
"""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.privacy.aside import SparingNoise, part_key, set_aside
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.noise import NoiseSource

UNITS = [f"record {i}".encode() for i in range(2000)]
KEY = part_key(b"k" * 32, b"study")


def drawn(units):
    return dict(zip(units, set_aside(KEY, units, 0.2).tolist(), strict=True))


def shuffled(units):
    """The control: a fifth of a shuffled list."""
    order = np.random.default_rng(1).permutation(len(units))
    chosen = set(order[: len(units) // 5].tolist())
    return {unit: i in chosen for i, unit in enumerate(units)}


@pytest.mark.parametrize("draw", [drawn, shuffled])
def test_no_record_moves_another_between_the_parts(draw):
    before = draw(UNITS)
    moved = 0
    for after in (draw([*UNITS, b"one more"]), draw(UNITS[1:]), draw(UNITS[::-1])):
        moved += sum(after[unit] != part for unit, part in before.items() if unit in after)
    assert (moved == 0) == (draw is drawn)


def test_another_study_and_another_silo_draw_afresh():
    mine = set_aside(KEY, UNITS, 0.2)
    assert 0.16 < mine.mean() < 0.24
    for key in (part_key(b"k" * 32, b"other"), part_key(b"l" * 32, b"study")):
        others = set_aside(key, UNITS, 0.2)
        assert 0.02 < (mine & others).mean() < 0.06


def test_the_ledgers_key_gives_the_same_parts_after_a_kill(tmp_path):
    with Ledger(tmp_path / "a.sqlite", "silo-1") as ledger:
        first = ledger.part_key(b"study")
    with Ledger(tmp_path / "a.sqlite", "silo-1") as again, Ledger(tmp_path / "b", "b") as other:
        assert again.part_key(b"study") == first
        assert again.part_key(b"second") != first
        assert other.part_key(b"study") != first


def test_samples_leave_out_what_is_set_aside_and_are_otherwise_as_ever():
    aside = set_aside(KEY, UNITS, 0.2)
    for number in range(20):
        key = number.to_bytes(32, "big")
        whole = NoiseSource(key).poisson_batch(len(UNITS), 0.3)
        spared = SparingNoise(aside, key).poisson_batch(len(UNITS), 0.3)
        assert aside[whole].any()
        assert spared.tolist() == [unit for unit in whole.tolist() if not aside[unit]]
