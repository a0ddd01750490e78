"""The round loops with ``aggregation.scheme: ckks``: same sums, dropouts, crashes, settlement."""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.errors import ProtocolError
from securefedcollm.federation import roles, summing
from securefedcollm.federation.plan import quantiser
from securefedcollm.federation.roles import frames
from tests.support import joint
from tests.support.arithmetic import NAMES, SIZE, ArithmeticServer, make_study
from tests.support.client_level import CLIP, charged
from tests.support.client_level import PRIVACY as SILO_PRIVACY
from tests.support.rounds import (
    CHARGED_ONCE,
    Cut,
    Dies,
    Killed,
    Run,
    Wiretap,
    expected_theta,
    spent,
)

EXCHANGES = 7  # one trains, six aggregate
UPLOAD, OPENING = 4, 6


def study(kind: str = "precise", **changes):
    plan = {"clip_norm": CLIP, "scheme": "ckks", "ckks": kind}
    return make_study(aggregation=plan, **changes)


def test_the_mean_is_that_of_plain_arithmetic_bit_for_bit(tmp_path):
    made = study()
    theta = Run(tmp_path, made).go()
    np.testing.assert_array_equal(theta, expected_theta(made))
    assert spent(tmp_path, made) == dict.fromkeys(NAMES, CHARGED_ONCE)


def test_both_schemes_give_the_same_adapter(tmp_path):
    """Bit for bit where both have the same integers. Masking fills its fields up: 16 bits are 19
    there for four silos."""
    masked = make_study(aggregation={"clip_norm": CLIP, "value_bits": 19})
    sealed = make_study(aggregation={"clip_norm": CLIP, "value_bits": 19, "scheme": "ckks"})
    assert masked.field.bound == sealed.field.bound
    found = [Run(tmp_path / s.aggregation.scheme, s).go() for s in (masked, sealed)]
    np.testing.assert_array_equal(*found)


def test_compact_differs_by_the_error_that_was_stated(tmp_path):
    made = study("compact", rounds=1)
    error = Run(tmp_path, made).go() - expected_theta(made)
    unit = CLIP / made.field.bound
    # Of the sum: the law's error and a rounding; then the mean of four, halved by the server.
    expected = np.hypot(made.ring.rms, 12**-0.5) * unit / 4 * 0.5
    assert error.std() == pytest.approx(expected, rel=0.3)
    assert np.abs(error).max() <= (made.ring.greatest_error + 0.5) * unit / 8 * (1 + 1e-5)


@pytest.mark.parametrize("at", range(1, EXCHANGES))
def test_a_dropout_is_named_and_the_others_repeat_by_themselves(tmp_path, at):
    """Lost before the opening, at whatever step: the sum is that of the others."""
    made = study(rounds=1)
    run = Run(tmp_path, made, wrap=lambda e: Cut(e, ("silo-2",), at))
    theta = run.go()
    first = run.store.state.history[0]
    if at < OPENING:
        rest = tuple(n for n in NAMES if n != "silo-2")
        np.testing.assert_array_equal(theta, expected_theta(made, rest))
        assert first["survivors"] == list(rest)
        assert "silo-2" in first["dropouts"]
    else:  # the others' shares are out: a sum without silo-2 would bare its vector
        assert first["survivors"] == []
        assert "silo-2 lost in step unmask" in first["lost"]
    assert spent(tmp_path, made) == dict.fromkeys(NAMES, CHARGED_ONCE[:1])


class Leaving:
    """An engine that loses one more silo, for good, at each of some exchanges."""

    def __init__(self, engine, when):
        self.engine, self.when, self.count, self.gone = engine, dict(when), 0, set()

    def exchange(self, frames, timeout):
        self.gone |= {self.when[self.count]} if self.count in self.when else set()
        self.count += 1
        inner = Cut(self.engine, tuple(self.gone), 0)
        return inner.exchange(frames, timeout)


def test_an_abandoned_attempt_is_no_failure_but_below_the_quorum_there_is_no_sum(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(summing, "MAX_ATTEMPTS", 1)
    made = study(rounds=1)
    assert made.quorum == 3
    run = Run(tmp_path / "a", made, wrap=lambda e: Leaving(e, {UPLOAD: "silo-3"}))
    run.go()
    assert run.store.state.history[0]["survivors"] == ["silo-1", "silo-2", "silo-4"]
    again = EXCHANGES - 2 + UPLOAD  # five exchanges were made when the first attempt was abandoned
    two = {UPLOAD: "silo-3", again: "silo-1"}
    second = Run(tmp_path / "b", made, wrap=lambda e: Leaving(e, two))
    with pytest.raises(ProtocolError, match=r"silo-1 lost in step upload"):
        second.go()
    assert second.store.state.round == 0  # nothing was opened: it can be resumed
    theta = Run(tmp_path / "b", made, resume=True).go()
    np.testing.assert_array_equal(theta, expected_theta(made))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", [0, 2, 3, 4, 5, 6, 7, 13])
def test_killed_at_any_exchange_the_run_resumes_to_the_same_end(tmp_path, at, before):
    made = study(rounds=2)
    with pytest.raises(Killed):
        Run(tmp_path, made, wrap=lambda e: Dies(e, at, before)).go()
    theta = Run(tmp_path, made, resume=True).go()
    np.testing.assert_array_equal(theta, expected_theta(made))
    assert spent(tmp_path, made) == dict.fromkeys(NAMES, CHARGED_ONCE[:2])


def test_client_level_noise_is_summed_exactly_and_settled(tmp_path):
    made = study(privacy=SILO_PRIVACY)
    Run(tmp_path, made, private=False).go()
    for name in NAMES:
        assert charged(tmp_path, name) == [(r, "settled", 4) for r in range(3)]


def test_an_abandoned_upload_was_never_opened_and_costs_its_silo_nothing_more(tmp_path):
    """silo-2 is lost after all have uploaded; the others upload again. Under masking a vector that
    left twice stays charged at the worst case. Here nothing opens without the
    silo's own share, and it gave none."""
    made = study(privacy=SILO_PRIVACY, rounds=1)
    Run(tmp_path, made, private=False, wrap=lambda e: Cut(e, ("silo-2",), UPLOAD + 1)).go()
    assert charged(tmp_path) == [(0, "settled", 3)]
    assert charged(tmp_path, "silo-2") == [(0, "released", 3)]


def test_joint_dp_sgd_sums_its_steps_under_ckks(tmp_path):
    made = joint.study(aggregation={"value_bits": 20, "scheme": "ckks"})
    live = joint.run(tmp_path, made)
    joint.check_theta(made, live.go(), live.server)
    sums = [(i, 0, "settled", 4) for i in range(made.sums)]
    assert all(joint.charged(tmp_path, name) == sums for name in NAMES)


def test_the_quantiser_is_the_scheme_s_own():
    assert quantiser(study(), SIZE).bound == 2**15 - 1


@pytest.mark.parametrize("colluders", [1, 2])
@pytest.mark.parametrize("plan", [{}, {"scheme": "ckks"}, {"scheme": "ckks", "ckks": "compact"}])
def test_every_reply_is_within_what_the_server_waits_for(tmp_path, monkeypatch, plan, colluders):
    """A silo is not waited for that announces more (``largest_reply``); honest ones are below it.
    That holds here with hardly any of the reserve for many silos' lists."""
    monkeypatch.setattr(frames, "SLACK", 16 * 1024)
    taps = []
    made = make_study(
        rounds=1,
        aggregation={"clip_norm": CLIP, **plan},
        silos={"count": 4, "colluders": colluders},
    )
    Run(tmp_path, made, wrap=lambda e: taps.append(Wiretap(e)) or taps[-1]).go()
    largest = max(len(reply) for replies in taps[0].received.values() for reply in replies)
    limit = roles.largest_reply(made, ArithmeticServer())
    assert largest <= limit
