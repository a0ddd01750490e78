"""A private validation: one more secure sum a round, of noised counts, charged to its own records.

Adversary: the server, which asks when and with which model it likes, kills processes, and sees what
is opened.
"""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation import consent, roles
from securefedcollm.federation.messages import Refused, Trained
from securefedcollm.federation.parts import sums_left, validation_study
from securefedcollm.federation.plan import (
    counting,
    ends_round,
    round_of,
    run_scope,
    sum_name,
    validates,
)
from securefedcollm.federation.silostore import SumMemory
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.aside import set_aside
from securefedcollm.privacy.identities import Content
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import digest
from tests.support.arithmetic import NAMES, ArithmeticSilo, make_silo, make_study
from tests.support.joint import study as joint_study
from tests.support.members import members_of
from tests.support.rounds import (
    CHARGED_ONCE,
    Cut,
    Dies,
    Killed,
    Run,
    begin,
    expected_theta,
    reply_to,
    spent,
)
from tests.support.validated import RECORDS, VALIDATED, AskedSilo

BOTH = [(sum_, 0, "settled") for sum_ in range(6)]


def run(directory, study, **options):
    return Run(directory, study, kind=AskedSilo, **options)


def counts_of(directory, study):
    """(right, wrong) of all silos' records, by the keys that the silos alone have."""
    total = np.zeros(2, dtype=int)
    for name in NAMES:
        silo = AskedSilo(name)
        with Ledger(directory / "silos" / name / "ledger.sqlite", name) as ledger:
            silo.set_aside(ledger.part_key(digest(study)))
        total += silo.counts
    return tuple(total.tolist())


@pytest.mark.parametrize(
    "aggregation",
    [
        {"clip_norm": 20.0},
        {"clip_norm": 20.0, "scheme": "ckks"},
        {"clip_norm": 20.0, "scheme": "ckks", "key_model": "authority"},
    ],
)
def test_without_noise_the_opened_counts_are_those_of_the_records(tmp_path, aggregation):
    study = make_study(**VALIDATED, privacy=None, aggregation=aggregation)
    live = run(tmp_path, study, private=False)
    live.go()
    wanted = counts_of(tmp_path, study)
    levels = counting(study).levels
    for record in live.store.state.history:
        found = record["private"]
        assert (found["right"], found["wrong"]) == wanted
        assert found["counts"] == [levels * count for count in wanted]
        assert found["accuracy"] == pytest.approx(wanted[0] / sum(wanted))
        assert (found["margin"], found["silos"]) == (0.0, 4)


def test_nothing_else_of_the_run_changes(tmp_path):
    """The tuned adapter is the same to the bit as without a validation."""
    with_it = run(tmp_path / "a", make_study(**VALIDATED))
    without = Run(tmp_path / "b", make_study())
    assert (with_it.go() == without.go()).all()
    assert with_it.server.distilled == without.server.distilled == [0, 1, 2]
    assert [r["survivors"] for r in with_it.store.state.history] == [list(NAMES)] * 3


def test_with_noise_the_counts_are_near_and_each_part_is_charged_by_itself(tmp_path):
    study = make_study(**VALIDATED)
    live = run(tmp_path, study)
    live.go()
    wanted = counts_of(tmp_path, study)
    for record in live.store.state.history:
        found = record["private"]
        assert (found["right"], found["wrong"]) != wanted
        assert abs(found["right"] - wanted[0]) < 6 * found["sigma"]
        assert abs(found["wrong"] - wanted[1]) < 6 * found["sigma"]
    assert spent(tmp_path, study) == dict.fromkeys(NAMES, BOTH)
    with Ledger(tmp_path / "silos" / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        entries = ledger.entries()
        tuned, held = ({e.about.records for e in entries if e.key.round % 2 == k} for k in (0, 1))
        assert len(tuned) == len(held) == 1
        tuned, held = ledger.stored(tuned.pop()), ledger.stored(held.pop())
        assert len(tuned) + len(held) == RECORDS
        assert not tuned.within(held).any()
        # A record's account: what its own part has spent, and nothing of the other one.
        for part in (tuned, held):
            assert 0 < ledger.standing(part).worst <= 8.0
        assert ledger.standing(held).worst > 7.5
        both = {e.about.study for e in entries}
        assert both == {digest(study).hex(), validation_study(study)}


def test_in_joint_steps_the_counts_follow_the_last_step(tmp_path):
    study = joint_study(rate=0.5, **VALIDATED)
    live = run(tmp_path, study, private=False)
    live.go()
    assert len(live.store.state.history) == 2
    wanted = counts_of(tmp_path, study)
    for record in live.store.state.history:
        assert abs(record["private"]["right"] - wanted[0]) < 6 * record["private"]["sigma"]
    with Ledger(tmp_path / "silos" / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        rates = [(e.key.round, e.counted[0].q, e.counted[0].shares) for e in ledger.entries()]
        assert rates == [(i, 1.0 if i % 4 == 3 else 0.5, 4) for i in range(8)]
        reserved = [e.reserved[0] for e in ledger.entries() if e.key.round % 4 == 3]
        assert {(e.shares, e.colluders) for e in reserved} == {(3, 1)}


@pytest.mark.parametrize(
    ("at", "before"),
    [(1, True), (5, False), (6, True), (6, False), (8, False), (9, True), (10, False), (11, False)],
)
def test_killed_anywhere_nothing_is_counted_or_noised_twice(tmp_path, at, before):
    """Of a sum that was opened, or of counts that were finished, nobody draws a second noise."""
    study = make_study(**VALIDATED)
    seen: dict[tuple[str, int], set[bytes]] = {}

    class Watches(Dies):
        def exchange(self, frames, timeout):
            try:
                return super().exchange(frames, timeout)
            finally:
                for path in tmp_path.glob("silos/*/update-*.npy"):
                    key = (path.parent.name, int(path.stem.split("-")[2]))
                    seen.setdefault(key, set()).add(path.read_bytes())

    with pytest.raises(Killed):
        run(tmp_path, study, wrap=lambda e: Watches(e, at, before)).go()
    again = run(tmp_path, study, resume=True, wrap=lambda e: Watches(e, 10**6, True))
    theta = again.go()
    assert spent(tmp_path, study) == dict.fromkeys(NAMES, BOTH)
    assert len(seen) == len(NAMES) * 6
    assert {len(vectors) for vectors in seen.values()} == {1}
    assert len(again.store.state.history) == 3
    assert (theta == expected_theta(study)).all()


def test_a_kill_after_the_servers_phase_does_not_repeat_it(tmp_path):
    study = make_study(**VALIDATED)
    first = run(tmp_path, study)

    class AfterTuning:
        def __init__(self, engine):
            self.engine = engine

        def exchange(self, frames, timeout):
            if first.store.state.tuned:
                raise Killed
            return self.engine.exchange(frames, timeout)

    first = run(tmp_path / "run", study, wrap=AfterTuning)
    with pytest.raises(Killed):
        first.go()
    assert first.server.distilled == [0]
    again = run(tmp_path / "run", study, resume=True)
    again.go()
    assert again.server.distilled == [1, 2]
    assert all("private" in record for record in again.store.state.history)


def test_too_few_silos_for_the_counts_end_the_run_which_can_be_resumed(tmp_path):
    study = make_study(**VALIDATED)
    broken = run(tmp_path, study, wrap=lambda e: Cut(e, ("silo-2", "silo-3"), 6))
    with pytest.raises(Exception, match="round 1, validation failed"):
        broken.go()
    again = run(tmp_path, study, resume=True)
    again.go()
    assert spent(tmp_path, study) == dict.fromkeys(NAMES, BOTH)


def test_patience_may_look_at_the_private_accuracy(tmp_path):
    """Without noise all rounds are equal, so the first is the best and one more is run."""
    study = make_study(**VALIDATED, privacy=None, keep={"metric": "private", "patience": 1})
    live = run(tmp_path, study, private=False)
    live.go()
    assert len(live.store.state.history) == 2
    assert live.store.best_adapters(1).is_dir()


# --- What a silo refuses -------------------------------------------------------------------------


def silo(directory, study, **options):
    return make_silo(
        "silo-1", silent, study=study, directory=directory, **{"kind": AskedSilo} | options
    )


def test_a_silo_goes_on_from_the_model_that_it_answered_with(tmp_path):
    mine = silo(tmp_path, make_study(**VALIDATED))
    for sum_, model in enumerate((0.0, 0.5, 0.5)):
        assert isinstance(reply_to(mine, begin(sum_, model=model)), Trained)


def test_a_silo_answers_with_one_model_a_round_and_refuses_to_go_on_from_another(tmp_path):
    """Adversary: a server that asks about one model and hands on another, or asks twice."""
    mine = silo(tmp_path, make_study(**VALIDATED))
    assert isinstance(reply_to(mine, begin(0)), Trained)
    assert isinstance(reply_to(mine, begin(1, model=0.5)), Trained)
    other = reply_to(mine, begin(1, attempt=1, model=0.6))
    assert isinstance(other, Refused)
    assert "second global model for round 1, validation" in other.message
    onward = reply_to(mine, begin(2, model=0.7))
    assert isinstance(onward, Refused)
    assert "second adapter as the end of round 1" in onward.message


def test_a_silo_whose_model_answers_no_questions_is_not_in(tmp_path):
    with pytest.raises(ConfigError, match="answers no questions"):
        silo(tmp_path, make_study(**VALIDATED), kind=ArithmeticSilo)


def test_parts_drawn_by_another_key_end_the_silos_run(tmp_path):
    """Adversary: whoever takes the key away, so that tuned records are asked and asked ones tuned.
    Without privacy the ledger holds no charge that would tell."""
    study = make_study(**VALIDATED, privacy=None)
    silo(tmp_path, study, private=False)
    (tmp_path / "silo-1" / "ledger.key").unlink()
    with pytest.raises(StateError, match="not the one that the run began with"):
        silo(tmp_path, study, private=False)


def test_a_record_that_both_parts_share_is_refused(tmp_path):
    """Two records of the same words are one to the ledger; no draw by identity parts them."""

    class Twins(AskedSilo):
        def contents(self):
            return [(b"same words".ljust(32), None)] * RECORDS

        def set_aside(self, key):
            self.parts = np.arange(RECORDS) < 20

    with pytest.raises(StateError, match="set aside and tuned on at once"):
        silo(tmp_path, make_study(**VALIDATED), kind=Twins)


class Patients(AskedSilo):
    """Two records each, one of which every patient has."""

    def contents(self):
        own = super().contents()
        return [(b"same words".ljust(32), f"p{i}") for i in range(RECORDS)] + [
            (words, f"p{i}") for i, (words, _) in enumerate(own)
        ]

    def set_aside(self, key):
        names = [owner.encode() for _, owner in self.contents()]
        self.parts = set_aside(key, names, self.share)

    def right_shares(self, adapter):
        return np.full(int(self.parts.sum()) // 2, 0.5)


class Columns(AskedSilo):
    """Rows that all have the same texts, in other columns."""

    def contents(self):
        return [Content(words, None, b"same row".ljust(32)) for words, _ in super().contents()]

    def set_aside(self, key):
        self.parts = set_aside(key, [content.words for content in self.contents()], self.share)


@pytest.mark.parametrize(
    ("kind", "unit"),
    [(Patients, {"unit": "subject", "subject": "patient"}), (Columns, {"unit": "record"})],
)
def test_units_with_an_identity_in_common_pay_for_their_own_part_alone(tmp_path, kind, unit):
    """Otherwise the run would end before its last round. Other studies do count both."""
    privacy = {"epsilon": 8.0, "delta": 1e-5} | unit
    study = make_study(**VALIDATED, privacy=privacy)
    Run(tmp_path, study, kind=kind).go()
    assert spent(tmp_path, study) == dict.fromkeys(NAMES, BOTH)
    with Ledger(tmp_path / "silos" / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        last = ledger.entries()[-1]
        assert ledger.spent(*last.key[:2], 1e-5).claim.epsilon <= 8.0
        records = ledger.stored(last.about.records)
        assert ledger.standing(records).worst > 8.0


def test_records_that_cannot_pay_for_the_counts_are_found_before_anything_is_trained(tmp_path):
    """Their budget is gone in another study; those that are tuned on could pay."""
    study = make_study(**VALIDATED)
    first = silo(tmp_path, study)
    with Ledger(tmp_path / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        asked = AskedSilo("silo-1")
        asked.set_aside(ledger.part_key(digest(study)))
        held = [c for c, aside in zip(asked.contents(), asked.parts, strict=True) if aside]
        events = counting(study).events(3)
        key = ("d" * 64, "record", "r" * 64, 0, 0)
        ledger.reserve(*key, events, (8.0, 1e-5), records=ledger.identify(held), study="s" * 64)
    refused = reply_to(first, begin(0))
    assert isinstance(refused, Refused)
    assert refused.message == "this silo cannot take part"
    assert first.training.workload.trained == []


def test_the_operator_sees_the_cost_and_goes_on_only_as_far_as_each_part_can_pay(tmp_path):
    """Before the run, and at every point of it: after the last sum of tuning only the counts are
    still to pay for, by other records than those that have nothing left."""
    with members_of(tmp_path, **VALIDATED) as members:
        member, mine = members["silo-1"], AskedSilo("silo-1")
        mine.records = RECORDS
        fresh = consent.terms(member, mine, None)
        assert (fresh.spent, fresh.untouched) == (0.0, RECORDS)
        assert 7.5 < fresh.after <= 8.0
        consent.require_budget(member, mine, None)
        session = roles.silo_session(member, mine, progress=silent, threads=1)
        scope = run_scope(member.study, b"r" * 16)
        store = session.training.store
        for sum_ in range(member.study.sums):
            assert isinstance(reply_to(session, begin(sum_)), Trained)
            SumMemory(store, scope, sum_).opened(0, 3)
            consent.require_budget(member, mine, None)
        after = consent.terms(member, mine, None)
        assert (after.spent, after.after) == (0.0, fresh.after)  # of other studies, and with this


def test_records_are_not_left_out_of_a_study_that_sets_some_aside(tmp_path):
    with members_of(tmp_path, **VALIDATED) as members:
        with pytest.raises(ConfigError, match="not left out") as refused:
            consent.without_spent(members["silo-1"], AskedSilo("silo-1"), None, lambda kept: kept)
        assert refused.value.where == "--records"


# --- The numbers of the sums ---------------------------------------------------------------------


def test_the_last_sum_of_every_round_is_its_validation():
    study, joint, plain = make_study(**VALIDATED), joint_study(**VALIDATED), make_study()
    assert (study.sums, joint.sums, plain.sums) == (6, 8, 3)
    assert [validates(study, s) for s in range(6)] == [False, True] * 3
    assert [validates(joint, s) for s in range(8)] == [False, False, False, True] * 2
    assert not any(validates(plain, s) for s in range(3))
    assert [round_of(joint, s) for s in range(8)] == [0] * 4 + [1] * 4
    assert [s for s in range(8) if ends_round(joint, s)] == [3, 7]
    assert sum_name(joint, 6) == "round 2, step 3"
    assert sum_name(joint, 7) == "round 2, validation"
    assert [sums_left(joint, s, held=False) for s in range(8)] == [6, 5, 4, 3, 3, 2, 1, 0]
    assert [sums_left(joint, s, held=True) for s in range(8)] == [2] * 4 + [1] * 4


def test_older_studies_keep_their_digest_and_a_second_study_draws_other_parts():
    assert "validation" not in make_study().tree
    assert validation_study(make_study(**VALIDATED)) != validation_study(
        make_study(**VALIDATED, seed=1)
    )
    assert CHARGED_ONCE[-1][0] == make_study().sums - 1
