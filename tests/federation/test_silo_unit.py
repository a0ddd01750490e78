"""Client-level privacy end to end: clip, noise shares, secure sum, and what the ledger makes of it.

Adversary: the server and ``silos.colluders`` silos, who know the opened sums and their own shares.
"""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.errors import ConfigError, TrainingError
from securefedcollm.federation.messages import (
    Ended,
    EndRun,
    Refused,
    Trained,
    decode_reply,
    encode,
)
from securefedcollm.federation.silo import Clock
from securefedcollm.federation.silostore import SiloStore, SumMemory
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.adversaries import per_adversary
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.silo_unit import Setting, SiloUnit, calibrate_silo
from tests.support.arithmetic import NAMES, SIZE, ArithmeticSilo, make_silo, make_study, update_of
from tests.support.client_level import CLIP, PRIVACY, charged, run, study, unit_of
from tests.support.rounds import Cut, Dies, Killed, begin, reply_to


def test_the_sum_has_the_designed_noise_and_every_round_is_settled_with_it(tmp_path):
    made = study()
    live = run(tmp_path, made)
    noise = []

    def absorb(mean, round_, add=live.server.absorb):
        theta = live.server.theta
        noise.append(mean - np.mean([update_of(n, round_, theta) for n in NAMES], axis=0))
        add(mean, round_)

    live.server.absorb = absorb
    live.go()
    unit = unit_of(made)
    # Four shares of σ²/(3 - 1) are in a sum: √2 times the noise that the accountant asked for.
    designed = unit.noise_multiplier * CLIP * np.sqrt(4 / 2) / 4
    assert np.std(noise) == pytest.approx(designed, rel=0.15)
    for name in NAMES:
        assert charged(tmp_path, name) == [(r, "settled", 4) for r in range(3)]
    with Ledger(tmp_path / "silos" / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        first, *_ = ledger.entries()
        assert (first.key.unit, first.reserved[0].shares) == ("silo", 3)
        assert first.reserved[0].noise_multiplier == pytest.approx(unit.noise_multiplier)
        events = ledger.spent(*first.key[:2], 1e-5).events
        found = per_adversary(events, [1e-5], 1, terms=first.terms)
    by_name = {row.adversary: row.epsilons[0].epsilon for row in found}
    assert by_name["outsider"] == by_name["server"] < by_name["another silo"]
    # Three rounds at the worst case would be ε = 8; the fourth share made them cheaper.
    assert by_name["another silo"] == by_name["server+1 silo"] < 6.5


def test_a_dropout_s_share_is_missing_from_the_settlement(tmp_path):
    """Lost at the upload: its noise is not in the sum, and the others charge for that."""
    made = study(rounds=1)
    run(tmp_path, made, wrap=lambda e: Cut(e, ("silo-2",), 3)).go()
    assert charged(tmp_path) == [(0, "settled", 3)]
    assert charged(tmp_path, "silo-2") == [(0, "released", 3)]  # it cannot know


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", [0, 2, 3, 4, 5])
def test_a_sum_that_was_asked_for_twice_stays_charged_at_the_worst_case(tmp_path, at, before):
    """All processes die in round 1. What goes out again is the same vector, noise included; but a
    silo whose vector left twice cannot know which sum was opened, and settles nothing."""
    made = study()
    with pytest.raises(Killed):
        run(tmp_path, made, wrap=lambda e: Dies(e, at, before)).go()
    kept = vectors(tmp_path)
    resumed = run(tmp_path, made, resume=True)
    resumed.engine.exchange = watch(resumed.engine.exchange, seen := [], tmp_path)
    resumed.go()
    assert all(np.array_equal(vector, seen[0][path]) for path, vector in kept.items())
    uploaded = at > 3 or (at, before) == (3, False)
    first = "released" if uploaded else "settled"
    assert charged(tmp_path) == [
        (0, first, 3 if uploaded else 4),
        (1, "settled", 4),
        (2, "settled", 4),
    ]


def vectors(directory):
    return {p: np.load(p) for p in directory.glob("silos/*/update-*.npy")}


def watch(exchange, seen, directory):
    """Looks at the stored vectors after every exchange."""

    def watched(frames, timeout):
        replies = exchange(frames, timeout)
        seen.append(vectors(directory))
        return replies

    return watched


def test_a_silo_that_agreed_in_one_attempt_and_uploads_in_another_knows_no_sum(tmp_path):
    """Adversary: a server that has this silo open four shares, then opens a sum of three."""
    memory = SumMemory(SiloStore(tmp_path), b"s" * 32, 0)
    assert memory.survivors() is None
    memory.uploaded(0)
    memory.opened(0, 4)
    assert memory.survivors() == 4
    memory.uploaded(0)
    assert memory.survivors() == 4
    memory.uploaded(1)
    assert memory.survivors() is None


def test_a_run_that_ended_has_no_further_attempt(tmp_path):
    silo = make_silo("silo-1", silent, study=study(), directory=tmp_path, private=False)
    stranger = reply_to(silo, encode(EndRun(b"x" * 16)))
    assert "takes no part in" in stranger.message
    assert isinstance(reply_to(silo, begin(0)), Trained)
    assert isinstance(reply_to(silo, encode(EndRun(b"r" * 16))), Ended)
    assert isinstance(reply_to(silo, begin(2, attempt=1)), Refused)
    with Ledger(tmp_path / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        assert [e.state for e in ledger.entries()] == ["released"]  # nothing was opened


def test_silos_with_another_mechanism_do_not_add_up():
    """Its identity is in the round header: another clip, noise or field is another round."""
    setting = Setting(SIZE, 2**18, 3, 1)
    base = SiloUnit(setting, 2.0, CLIP).identity
    assert SiloUnit(setting, 2.0, CLIP).identity == base
    others = [
        SiloUnit(setting, 2.001, CLIP),
        SiloUnit(setting, 2.0, CLIP + 1),
        SiloUnit(setting._replace(field_bound=2**17), 2.0, CLIP),
        SiloUnit(setting._replace(values=SIZE + 1), 2.0, CLIP),
        SiloUnit(setting._replace(colluders=0), 2.0, CLIP),
    ]
    assert len({base, *(other.identity for other in others)}) == 6


def test_sensitivity_is_what_one_silo_can_change(tmp_path):
    """Under the same noise, with or without a silo's (far too long) update: Σ of squares <= Δ²."""
    unit = SiloUnit(Setting(SIZE, 2**18, 3, 1), 2.0, CLIP)
    long = np.random.default_rng(0).normal(size=SIZE) * 1e3
    with_it = unit.protect(long, NoiseSource(b"k" * 32))
    without = unit.protect(np.zeros(SIZE), NoiseSource(b"k" * 32))
    change = sum(int(x) ** 2 for x in with_it - without)
    assert 0.98 * unit.event().sensitivity ** 2 < change <= unit.event().sensitivity ** 2


def test_a_field_without_room_names_the_key():
    with pytest.raises(ConfigError, match=r"aggregation.value_bits: the field is too narrow"):
        SiloUnit(Setting(10**6, 2**10, 3, 1), 2.0, CLIP)
    with pytest.raises(ConfigError, match=r"aggregation.value_bits"):
        calibrate_silo(1.0, 1e-5, 100, Setting(10**7, 2**12, 3, 1))


def test_an_epsilon_at_which_residuals_take_all_of_delta_is_refused_as_such():
    with pytest.raises(ConfigError, match="residuals would take all of δ") as caught:
        calibrate_silo(60.0, 1e-5, 36, Setting(SIZE, 2**18, 3, 1))
    assert "lower ε" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"unit": "silo", "noise": "local"}, "privacy.noise: no study can ask for unit: silo"),
        ({"unit": "record", "noise": "distributed"}, "local.sampling_rate: joint DP-SGD needs"),
        ({"clip_norm": 1.0}, "privacy.clip_norm: 1 and aggregation.clip_norm: 20"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_the_fix(change, where):
    with pytest.raises(ConfigError) as caught:
        make_study(privacy=PRIVACY | change)
    assert str(caught.value).startswith(where)
    assert caught.value.hint


class Overflows(ArithmeticSilo):
    """A training that certain records make fail, at the adapter that the server chose."""

    def fit(self, adapter, round_, progress):
        if self.fails:
            raise TrainingError("the gradient of step 3 is not finite")
        return super().fit(adapter, round_, progress)


class Breaks(ArithmeticSilo):
    def fit(self, adapter, round_, progress):
        if self.fails:
            raise IndexError("index 7 is out of range for the record 'Ada'")
        return super().fit(adapter, round_, progress)


def test_a_training_that_breaks_is_charged_and_says_nothing(tmp_path):
    """Adversary: as below, of a silo that notices nothing until its process is gone."""
    breaks = Breaks("silo-1", fails=True)
    silo = make_silo("silo-1", silent, study=make_study(), directory=tmp_path, workload=breaks)
    refusal = reply_to(silo, begin())
    assert (refusal.message, refusal.kind) == ("this silo cannot take part", "Refused")
    with Ledger(tmp_path / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        assert [e.state for e in ledger.entries()] == ["settled"]


@pytest.mark.parametrize("kind", [ArithmeticSilo, Overflows, Breaks])
def test_whether_training_failed_is_no_answer_without_noise(tmp_path, caplog, kind):
    """Adversary: a server whose adapter makes training fail if one record is there. Eight silos,
    four with that record: all answers have one type and size, all cost the same, and what is sent
    is the silo's noise. The operator reads why."""
    answers, vectors_ = set(), {True: [], False: []}
    for i in range(8):
        fails, home = i % 2 == 1, tmp_path / str(i)
        workload = kind("silo-1", private=False, fails=fails)
        silo = make_silo("silo-1", silent, study=study(), directory=home, workload=workload)
        reply = silo.step(begin())
        answers.add((type(decode_reply(reply, "silo-1")), len(reply)))
        (path,) = (home / "silo-1").glob("update-*.npy")
        vectors_[fails].append(np.load(path).astype(float))
        with Ledger(home / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
            assert [e.state for e in ledger.entries()] == ["released"]
    assert answers == {(Trained, len(encode(Trained())))}
    share = unit_of(study())._distributed.share_sigma
    assert np.std(vectors_[True]) == pytest.approx(share, rel=0.2)  # zero and noise
    assert "it contributes noise only" in caplog.text


def test_answers_leave_at_the_end_of_a_slot(tmp_path):
    """Adversary: a server that measures how long a silo trains."""
    made = study(local={"steps": 5, "batch_size": 10, "learning_rate": 0.01, "reply_slot": 60.0})
    taken = [(12.5, 47.5), (59.0, 1.0), (61.0, 59.0)]
    times = iter([at for took, _ in taken for at in (100.0, 100.0 + took)] + [0.0, 3.0])
    waited: list[float] = []
    clock = Clock(times.__next__, waited.append)
    silo = make_silo("silo-1", silent, study=made, directory=tmp_path, private=False, clock=clock)
    for round_, (_, rest) in enumerate(taken):
        silo.step(begin(round_))
        assert waited.pop() == pytest.approx(rest)
    assert isinstance(reply_to(silo, begin(0)), Refused)  # a refusal takes as long
    assert waited == [57.0]
    assert silo.pace is not None  # by which its inbox answers other calls meanwhile
    plain = make_silo("silo-2", silent, study=study(), directory=tmp_path, private=False)
    assert plain.pace is None
