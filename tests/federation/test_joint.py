"""Joint DP-SGD: every optimiser step one secure sum, with kills, dropouts and canaries.

Adversary: the server and ``silos.colluders`` silos, who know every opened sum and their own noise.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
from securefedcollm_audits.privacy.lower_bounds import audit_scores
from securefedcollm_audits.protocol.cohort import Cohort, play

from securefedcollm.aggregation import Step
from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.messages import Refused, Trained
from securefedcollm.federation.plan import joint_step, sum_name
from securefedcollm.federation.workload import silent
from securefedcollm.primitives import sha256
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import Gaussian
from securefedcollm.privacy.joint import JointSetting, JointStep, calibrate_joint
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.noise import NoiseSource
from tests.support.arithmetic import NAMES, SIZE, make_silo, make_study
from tests.support.joint import (
    ROUNDS,
    STEPS,
    charged,
    check_theta,
    run,
    study,
)
from tests.support.rounds import Cut, Dies, Killed, begin, reply_to

EXCHANGES = 6


@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_is_a_sum_with_the_designed_noise_and_charged_once(tmp_path, workers):
    made = study()
    live = run(tmp_path, made, workers=workers)
    check_theta(made, live.go(), live.server)
    assert live.server.distilled == [0, 1]
    sums = [(i, 0, "settled", 4) for i in range(made.sums)]
    assert all(charged(tmp_path, name) == sums for name in NAMES)
    first, second = live.store.state.history
    assert first["survivors"] == second["survivors"] == list(NAMES)
    assert first["bytes_up"] == second["bytes_up"]
    assert min(first["bytes_up"].values()) > STEPS * 8 * SIZE / 3


def test_the_whole_run_is_within_its_budget_for_the_worst_adversary(tmp_path):
    """Reserved for three shares, of which the adversary knows one; four came."""
    made = study(rate=0.5)
    run(tmp_path, made).go()
    with Ledger(tmp_path / "silos" / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        entries = ledger.entries()
        reserved = [event for entry in entries for event in entry.reserved]
        assert {(e.q, e.shares, e.colluders, e.values) for e in reserved} == {(0.5, 3, 1, SIZE)}
        assert 7.5 < claim(reserved, 1e-5).epsilon <= 8.0
        assert ledger.spent(*entries[0].key[:2], 1e-5).claim.epsilon < 8.0


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", [0, 3, 5, 8, 11, 17, 18, 22])
def test_killed_at_any_exchange_of_any_step_nothing_is_counted_twice(tmp_path, at, before):
    """Exchange 17 ends round 1. The optimiser's state comes back with the step, not the round."""
    made = study()
    with pytest.raises(Killed):
        run(tmp_path, made, wrap=lambda e: Dies(e, at, before)).go()
    again = run(tmp_path, made, resume=True)
    assert (again.store.state.round, again.store.state.step) == divmod(at // EXCHANGES, STEPS)
    check_theta(made, again.go(), again.server)
    assert len(again.store.state.history) == ROUNDS
    for name in NAMES:
        assert [entry[:2] for entry in charged(tmp_path, name)] == [
            (i, 0) for i in range(made.sums)
        ]


class Blinks:
    """An engine that loses one silo from exchange ``start`` on, for ``count`` exchanges."""

    def __init__(self, engine, lost, start, count):
        self.engine, self.lost = engine, lost
        self.at, self.gone = -1, range(start, start + count)

    def exchange(self, frames, timeout):
        self.at += 1
        lost = [n for n in frames if n == self.lost and self.at in self.gone]
        alive = {n: f for n, f in frames.items() if n not in lost}
        return self.engine.exchange(alive, timeout) | {n: Failure("cut off") for n in lost}


def test_a_silo_that_misses_a_step_is_back_in_the_next(tmp_path):
    made = study()
    live = run(tmp_path, made, wrap=lambda e: Blinks(e, "silo-2", EXCHANGES + 3, 3))
    live.go()
    assert [entry[3] for entry in charged(tmp_path)] == [4, 3, 4, 4, 4, 4]
    assert charged(tmp_path, "silo-2")[1] == (1, 0, "released", 3)  # it cannot know
    first, second = live.store.state.history
    assert first["survivors"] == ["silo-1", "silo-3", "silo-4"]
    assert set(first["dropouts"]) == {"silo-2"}
    assert second["survivors"] == list(NAMES)


def test_a_step_with_too_few_silos_ends_the_run_and_stays_charged(tmp_path):
    made = study()
    broken = run(tmp_path, made, wrap=lambda e: Cut(e, ("silo-2", "silo-3"), EXCHANGES + 3))
    with pytest.raises(Exception, match="round 1, step 2 failed"):
        broken.go()
    assert charged(tmp_path) == [(0, 0, "settled", 4), (1, 0, "released", 3)]
    again = run(tmp_path, made, resume=True)
    check_theta(made, again.go(), again.server)


def test_a_lost_optimiser_state_is_told_by_name(tmp_path):
    made = study()
    with pytest.raises(Killed):
        run(tmp_path, made, wrap=lambda e: Dies(e, EXCHANGES + 1, True)).go()
    (kept,) = (tmp_path / "server").glob("descent-*.safetensors")
    for damaged in (kept.read_bytes()[:-30], b"", b"no archive"):
        kept.write_bytes(damaged)
        with pytest.raises(StateError, match=r"descent-.*the optimiser's state cannot be read"):
            run(tmp_path, made, resume=True).go()


def test_a_silo_takes_no_step_beyond_the_study_and_none_twice(tmp_path, caplog):
    """Adversary: a server that wants one more noised sum, or the same step with another model."""
    caplog.set_level(logging.WARNING)
    made = study()
    silo = make_silo("silo-1", silent, study=made, directory=tmp_path, private=False)
    assert "asked for round 3, step 1" in reply_to(silo, begin(made.sums)).message
    assert isinstance(reply_to(silo, begin(1)), Trained)
    assert (
        "asked for round 1, step 1, attempt 1 again" in reply_to(silo, begin(0, attempt=1)).message
    )
    second = reply_to(silo, begin(1, attempt=1, model=1.0))
    assert isinstance(second, Refused)
    assert "second global model for round 1, step 2" in second.message
    assert silo.training.workload.trained == [0]


def test_a_run_that_the_budget_cannot_see_through_is_refused_in_steps(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    silo = make_silo("silo-1", silent, study=study(), directory=tmp_path, private=False)
    earlier = [Gaussian(1.5)]
    with Ledger(tmp_path / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        ledger.reserve(silo.training.workload.dataset, "record", "run", 0, 0, earlier, (8.0, 1e-5))
    assert isinstance(reply_to(silo, begin(0)), Refused)
    assert silo.training.workload.trained == []
    assert "the 6 steps of this run would bring it to" in caplog.text


def test_an_empty_batch_is_noise_and_cannot_be_told_from_its_size(tmp_path):
    made = study(rate=0.5)
    step = joint_step(made, SIZE)
    nothing = step.protect([], NoiseSource())
    assert nothing.shape == (SIZE,)
    assert np.count_nonzero(nothing) > SIZE // 2


# --- the mechanism ------------------------------------------------------------------------------

SETTING = JointSetting(
    values=3000,
    field_bound=2**28,
    least_survivors=5,
    colluders=1,
    sampling_rate=0.5,
    batch_size=40,
)


def test_the_guarantee_rests_on_honest_shares_only():
    """Adversary: a colluding silo that leaves its noise out: four honest shares carry all of z."""
    step = JointStep(SETTING, 1.5, 1.0)
    event = step.event()
    assert (event.shares, event.colluders, event.honest) == (5, 1, 4)
    assert event.noise_multiplier == pytest.approx(1.5)
    total = sum(step.protect([], NoiseSource()) for _ in range(4)) + 0  # the fifth adds nothing
    assert np.std(total) / event.sensitivity == pytest.approx(1.5, rel=0.06)


def test_participants_with_another_mechanism_do_not_add_up():
    base = JointStep(SETTING, 1.5, 1.0).identity
    assert JointStep(SETTING, 1.5, 1.0).identity == base
    others = [
        JointStep(SETTING, 1.501, 1.0),
        JointStep(SETTING, 1.5, 1.1),
        *(
            JointStep(SETTING._replace(**{key: value}), 1.5, 1.0)
            for key, value in (
                ("values", 3001),
                ("field_bound", 2**27),
                ("colluders", 0),
                ("sampling_rate", 0.4),
                ("batch_size", 41),
            )
        ),
    ]
    assert len({base, *(other.identity for other in others)}) == 8


def test_a_field_without_room_names_the_key():
    with pytest.raises(ConfigError, match=r"aggregation.value_bits: the field is too narrow"):
        JointStep(SETTING._replace(field_bound=2**10), 1.5, 1.0)
    with pytest.raises(ConfigError, match=r"aggregation.value_bits"):
        calibrate_joint(1.0, 1e-5, 100, SETTING._replace(field_bound=2**8))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"local": {"steps": 3, "batch_size": 8, "learning_rate": 0.1}}, "local.sampling_rate: j"),
        ({"privacy": {"epsilon": 8.0, "delta": 1e-5}}, "local.sampling_rate: only joint DP-SGD"),
        (
            {"local": {"steps": 3, "batch_size": 8, "learning_rate": 0.1, "sampling_rate": 1e-12}},
            "local.sampling_rate: an expected batch of 8 at rate 1e-12 means 8e+12 records",
        ),
        ({"adapter": {"method": "rolora"}}, "adapter.method: rolora alternates"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_fix(change, where):
    with pytest.raises(ConfigError) as caught:
        study(**change)
    assert str(caught.value).startswith(where)
    assert caught.value.hint


def test_sums_have_names_that_an_operator_understands():
    made = study()
    assert [sum_name(made, i) for i in (0, 4)] == ["round 1, step 1", "round 2, step 2"]
    assert sum_name(make_study(), 1) == "round 2"


# --- canaries over the whole path ---------------------------------------------------------------


class NoNoise(NoiseSource):
    """The bug or the laziness to be found: a silo that adds no noise share."""

    def add_discrete_gaussian(self, values, sigma):
        pass


def canaries(step, label, noiseless=()):
    """(scores of records that were there, of none) from one step, all shares, masks and bits real.

    Each honest silo holds one canary record of its own coordinate, sampled at rate q; the worst
    round that the accountant charges for: five survivors of six, one of them the adversary's.
    """
    cohort = Cohort(
        silos=6, values=step.values, bound=SETTING.field_bound, threshold=5, label=label
    )
    lost, *survivors = cohort.names
    for index, name in enumerate(survivors):
        key = sha256(f"{label} {name}".encode())
        noise = NoNoise(key) if index in noiseless else NoiseSource(key)
        canary = np.zeros(step.values)
        canary[index] = 7.0  # longer than C: the clip is part of the path
        sampled = NoiseSource(sha256(key)).poisson_batch(1, step.sampling_rate)
        cohort.vectors[name] = step.protect([canary] * len(sampled), noise)
    result = play(
        {name: cohort.silo(name) for name in cohort.names},
        CoordinatorRound(header=cohort.header, roster=cohort.roster),
        reply=lambda at, name, frame: None if at is Step.UPLOAD and name == lost else frame,
    )
    known = cohort.plain_sum(survivors[4:])
    seen = (step.decode(result.sum - known) * SETTING.batch_size).astype(np.float64)
    return seen[:4], seen[4:]


def bound_and_claim(z, steps=60, noiseless=()):
    step = JointStep(SETTING, z, 1.0)
    played = [canaries(step, f"canary {i}", noiseless) for i in range(steps)]
    present, absent = (np.concatenate(scores) for scores in zip(*played, strict=True))
    return audit_scores(present, absent, 1e-5).epsilon, claim([step.event()], 1e-5).epsilon


def test_canaries_do_not_refute_the_claim_and_do_if_shares_are_dropped():
    found, claimed = bound_and_claim(z=0.8)
    assert 0.1 < found < claimed
    found, claimed = bound_and_claim(z=0.8, noiseless=(0, 1, 2))
    assert found > claimed
