"""A clip norm that follows the updates, through the whole federation loop.

Adversary: the server and ``silos.colluders`` silos, as for every sum of the ``silo`` unit; the
count is one more coordinate of that sum. The server also chooses the clip norm that it broadcasts.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from securefedcollm.federation.messages import BeginRound, Refused, Trained, encode
from securefedcollm.federation.plan import adaptive_clip, silo_unit
from securefedcollm.privacy.events import DiscreteGaussian
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.silo_unit import Setting, SiloUnit
from tests.support.arithmetic import NAMES, SIZE, make_silo, make_study, update_of
from tests.support.rounds import Dies, Killed, Run, reply_to

NORMS = dict(zip(NAMES, (0.1, 1.0, 4.0, 40.0), strict=True))
"""Any clip norm between 1 and 4 leaves half of the updates whole."""


def study(start, rounds, epsilon, **adaptive):
    privacy = {
        "epsilon": epsilon,
        "delta": 1e-5,
        "unit": "silo",
        "noise": "distributed",
        "clip_norm": start,
        "adaptive": {"count_noise": 1.2, **adaptive},
    }
    # At a clip norm of 2000 the noise is far larger than what tuning makes.
    wide = {"max_abs": 1e4}
    return make_study(
        rounds=rounds, privacy=privacy, aggregation={"clip_norm": start}, adapter=wide
    )


def run(directory, made, **options):
    return Run(directory, made, private=False, norms=NORMS, **options)


@pytest.mark.parametrize("start", [2e-3, 2e3])
def test_it_converges_to_the_median_from_far_below_and_far_above(tmp_path, start):
    """Real noise, but little: four silos could not hear themselves through that of a usual ε.
    Counting the clipped instead would drive C away from the norms for ever."""
    live = run(tmp_path, study(start, 24, 40.0, learning_rate=1.5))
    live.go()
    course = [record["clip_norm"] for record in live.store.state.history]
    assert course[0] == start
    late = math.exp(np.mean(np.log(course[-10:])))
    assert NORMS["silo-2"] / 5 < late < NORMS["silo-3"] * 5
    with Ledger(tmp_path / "silos" / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        entries = ledger.entries()
        assert ledger.spent(*entries[0].key[:2], 1e-5).claim.epsilon < 40.0
    (event,) = {entry.reserved[0] for entry in entries}  # the same, whatever the clip norm is
    assert event.values == SIZE + 1


def test_update_and_count_together_have_the_sensitivity_that_is_charged():
    """Under the same noise with and without a silo: one zero-out changes Σ of squares by <= Δ²,
    the count included, whether its update was clipped or not."""
    unit = SiloUnit(Setting(SIZE, 2**20, 3, 1), 2.0, 5.0, count_noise=1.5)
    event = unit.event()
    assert isinstance(event, DiscreteGaussian)
    assert (unit.values, event.values) == (SIZE + 1, SIZE + 1)
    direction = update_of("silo-1", 0, np.zeros(SIZE)).astype(np.float64)
    direction /= np.linalg.norm(direction)
    silent = unit.protect(np.zeros(SIZE), NoiseSource(b"k" * 32))
    silent[-1] -= round_to_count(unit)  # a zero update is not clipped; a zero contribution is zero
    for norm, low in ((1e3, 0.98), (5.0 - 1e-6, 0.98), (0.0, 0.0)):
        change = unit.protect(norm * direction, NoiseSource(b"k" * 32)) - silent
        squares = sum(int(x) ** 2 for x in change)
        assert low * event.sensitivity**2 < squares <= event.sensitivity**2
        assert (change[-1] < 0) == (norm > 5.0)
        # The count alone: noise 1.5 times the multiplier over its sensitivity.
        noise = event.share_sigma * math.sqrt(event.honest)
        assert noise / abs(int(change[-1])) == pytest.approx(2.0 * 1.5, rel=1e-3)


def round_to_count(unit):
    """Integers of an indicator of 1/2: noise of the sum over 1.5 · 2."""
    event = unit.event()
    exact = event.share_sigma * math.sqrt(event.honest) / (1.5 * 2.0)
    return round(exact * (1.0 - math.sqrt(unit.values) / (2.0 * event.sensitivity)))


def test_the_sum_gives_the_mean_of_the_clipped_updates_and_the_count():
    unit = SiloUnit(Setting(SIZE, 2**24, 3, 0), 0.001, 2.0, count_noise=2.0)
    updates = [n * np.eye(SIZE)[i] for i, n in enumerate((1.0, 1.5, 8.0, 0.5))]
    total = sum(unit.protect(update, NoiseSource()) for update in updates)
    mean, indicators = unit.decode(total, 4)
    np.testing.assert_allclose(4 * mean[:4], [1.0, 1.5, 2.0, 0.5], atol=0.05)
    assert indicators == pytest.approx((3 - 1) / 2, abs=0.02)


def test_a_run_that_was_killed_goes_on_with_the_clip_norm_that_its_last_sum_gave(tmp_path):
    made = study(0.01, 3, 40.0)
    killed = run(tmp_path, made, wrap=lambda e: Dies(e, 8, before=True))
    with pytest.raises(Killed):
        killed.go()  # in round 2
    resumed = run(tmp_path, made, resume=True)
    resumed.go()
    course = [record["clip_norm"] for record in resumed.store.state.history]
    assert course[0] == 0.01
    assert course[1] == killed.store.state.clip_norm != 0.01
    assert course[2] == pytest.approx(course[1], rel=0.2 * 0.5 + 0.01)
    assert resumed.store.state.clip_norm != course[2]


def begin(round_, clip_norm, attempt=0):
    adapter = np.zeros(SIZE, dtype="<f4").tobytes()
    return encode(BeginRound(b"r" * 16, round_, attempt, b"l" * 32, adapter, clip_norm))


def test_a_silo_refuses_a_clip_norm_that_no_counts_could_have_led_to(tmp_path):
    """Adversary: a server that would have every update clipped to nothing, or drowned in noise."""
    made = study(2.0, 3, 8.0)
    silo = make_silo("silo-1", print, study=made, directory=tmp_path, private=False, norms=NORMS)
    step = math.exp(0.2 * 0.5)
    for round_, wrong in [
        (0, 2.01),
        (0, 0.0),
        (0, math.nan),
        (1, 2.0 * step * 1.001),
        (1, 2.0 / step / 1.001),
        (1, math.inf),
        (1, -2.0),
    ]:
        refusal = reply_to(silo, begin(round_, wrong))
        assert isinstance(refusal, Refused)
        assert "sent clip norm" in refusal.message
    assert silo.training.workload.trained == []
    assert isinstance(reply_to(silo, begin(1, 2.0 * step)), Trained)
    second = reply_to(silo, begin(1, 2.0, attempt=1))
    assert "second global model for round 2" in second.message


def test_a_silo_of_a_study_with_a_fixed_clip_norm_takes_no_other(tmp_path):
    silo = make_silo("silo-1", print, study=make_study(), directory=tmp_path)
    assert "which the study fixes" in reply_to(silo, begin(0, 20.0)).message


def test_silos_that_were_told_different_clip_norms_do_not_add_up():
    """Adversary: a server that tells one silo another C: it is in the header of their round."""
    made = study(2.0, 3, 8.0)
    units = [silo_unit(made, lambda round_: SIZE, 1, clip) for clip in (2.0, 2.0, 2.1)]
    other = silo_unit(study(2.0, 3, 8.0, count_noise=3.0), lambda round_: SIZE, 1, 2.0)
    identities = [unit.identity for unit in (*units, other)]
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


def test_the_clip_norm_is_within_reach_of_any_counts():
    clip = adaptive_clip(study(3.0, 3, 8.0, quantile=0.8, learning_rate=0.7))
    low = high = clip
    for rounds in range(1, 40):
        low, high = low.next(1e9, 4), high.next(-1e9, 4)
        least, most = clip.reach(rounds)
        assert least <= low.clip_norm < high.clip_norm <= most
        assert least == pytest.approx(low.clip_norm)
        assert most == pytest.approx(high.clip_norm)
