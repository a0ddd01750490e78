"""The ledger: no path, crash or second process gets a release past the budget or for free."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import rfc8785

from securefedcollm.errors import (
    BudgetExceeded,
    ConfigError,
    EvidenceError,
    LocalProtocolError,
    StateError,
)
from securefedcollm.primitives import sha256
from securefedcollm.privacy.accounting import TIGHT_SHARE, calibrate, claim
from securefedcollm.privacy.events import DiscreteGaussian, Gaussian, PoissonGaussian
from securefedcollm.privacy.journal import Head
from securefedcollm.privacy.ledger import Ledger

BUDGET = (8.0, 1e-5)
STEP = [PoissonGaussian(0.05, 1.0, 10)]
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.db"


@pytest.fixture
def ledger(path):
    with Ledger(path, "north", now=lambda: 1_700_000_000.0) as opened:
        yield opened


def reserve(ledger, round_=0, attempt=0, events=STEP, budget=BUDGET, run="run", dataset="data"):
    return ledger.reserve(dataset, "record", run, round_, attempt, events, budget)


def counted(ledger, dataset="data"):
    return ledger.spent(dataset, "record", 1e-5).events


# --- the life of an entry -----------------------------------------------------------------------


def test_reserve_release_settle(ledger):
    reservation = reserve(ledger)
    assert counted(ledger) == tuple(STEP)
    ledger.release(reservation)
    assert counted(ledger) == tuple(STEP)
    actual = (PoissonGaussian(0.05, 1.0, 7),)
    ledger.settle(reservation, actual)
    assert counted(ledger) == actual
    (entry,) = ledger.entries()
    assert (entry.state, entry.reserved, entry.settled) == ("settled", tuple(STEP), actual)
    assert [row.body["action"] for row in ledger.rows()] == ["reserve", "release", "settle"]
    assert ledger.rows()[0].body["time"] == "2023-11-14T22:13:20Z"


def test_spent_is_the_claim_of_everything_counted(ledger):
    for round_ in range(3):
        ledger.release(reserve(ledger, round_))
    summary = ledger.spent("data", "record", 1e-5)
    tight = claim([PoissonGaussian(0.05, 1.0, 30)], TIGHT_SHARE * 1e-5)
    assert (summary.claim.epsilon, summary.claim.delta) == (tight.epsilon, 1e-5)
    assert summary.entries == {"released": 3}
    assert ledger.spent("other", "record", 1e-5).claim.epsilon == 0.0
    assert ledger.spent("data", "silo", 1e-5).claim.epsilon == 0.0


def test_a_reservation_from_before_a_crash_is_found_again_and_counted_once(ledger, path):
    first = reserve(ledger)
    with Ledger(path, "north") as after_restart:
        assert reserve(after_restart) == first
        assert counted(after_restart) == tuple(STEP)
        after_restart.release(first)


def test_an_attempt_that_was_released_can_never_be_reserved_again(ledger):
    reservation = reserve(ledger)
    ledger.release(reservation)
    with pytest.raises(LocalProtocolError, match="attempt 1 of sum 1 is already released"):
        reserve(ledger)
    ledger.settle(reservation, STEP)
    with pytest.raises(LocalProtocolError, match="already settled"):
        reserve(ledger)
    reserve(ledger, attempt=1)
    assert counted(ledger) == (PoissonGaussian(0.05, 1.0, 20),)


def test_one_attempt_cannot_stand_for_two_different_releases(ledger):
    reserve(ledger)
    with pytest.raises(LocalProtocolError, match="other events"):
        reserve(ledger, events=[PoissonGaussian(0.05, 1.0, 9)])


def test_two_holders_of_one_reservation_release_it_once(ledger, path):
    """Adversary: a second process of the same silo, or an operator who starts the silo twice."""
    with Ledger(path, "north") as other:
        mine, theirs = reserve(ledger), reserve(other)
        ledger.release(mine)
        with pytest.raises(LocalProtocolError, match="released"):
            other.release(theirs)


def test_steps_out_of_order(ledger):
    reservation = reserve(ledger)
    with pytest.raises(LocalProtocolError, match="must be released"):
        ledger.settle(reservation, STEP)
    ledger.release(reservation)
    for step in (ledger.release, ledger.void):
        with pytest.raises(LocalProtocolError, match="must be reserved"):
            step(reservation)
    ledger.settle(reservation, STEP)
    with pytest.raises(LocalProtocolError, match="must be released"):
        ledger.settle(reservation, STEP)


def test_void_gives_back_only_what_never_left(ledger):
    reservation = reserve(ledger)
    ledger.void(reservation)
    assert counted(ledger) == ()
    with pytest.raises(LocalProtocolError, match="void"):
        ledger.release(reservation)
    with pytest.raises(LocalProtocolError, match="already void"):
        reserve(ledger)


@pytest.mark.parametrize(
    "actual",
    [
        [],
        [PoissonGaussian(0.05, 1.0, 11)],
        [PoissonGaussian(0.06, 1.0, 10)],
        [PoissonGaussian(0.05, 0.9, 10)],
        [Gaussian(1.0)],
    ],
)
def test_a_settlement_never_exceeds_its_reservation(ledger, actual):
    reservation = reserve(ledger)
    ledger.release(reservation)
    with pytest.raises(LocalProtocolError, match="may not exceed"):
        ledger.settle(reservation, actual)
    assert counted(ledger) == tuple(STEP)


def test_more_survivors_than_the_threshold_give_budget_back(ledger):
    worst = DiscreteGaussian(2.0**18, 2**18, 1000, shares=6, colluders=2)
    reservation = reserve(ledger, events=[worst])
    before = ledger.spent("data", "record", 1e-5).claim.epsilon
    ledger.release(reservation)
    ledger.settle(reservation, [DiscreteGaussian(2.0**18, 2**18, 1000, shares=10, colluders=2)])
    assert ledger.spent("data", "record", 1e-5).claim.epsilon < before


# --- the budget ---------------------------------------------------------------------------------


def test_a_run_that_would_not_fit_is_foreseen_and_its_advice_is_true(ledger):
    """Half of the budget is gone: three more rounds do not fit, and what is offered just does."""
    rounds, asked = 3, [Gaussian(4.0, 5)]
    ledger.foresee("data", "record", asked, rounds, BUDGET)
    ledger.release(reserve(ledger, events=[Gaussian(3.0, 18)], run="earlier"))
    before = ledger.rows()
    with pytest.raises(BudgetExceeded) as caught:
        ledger.foresee("data", "record", asked, rounds, BUDGET)
    assert ledger.rows() == before
    left = float(re.search(r"([0-9.]+) is left", caught.value.message)[1])
    spent = ledger.spent("data", "record", 1e-5).claim.epsilon
    assert 0 < 8.0 - spent - left < 1e-3
    assert "the 3 rounds of this run would bring it to" in caught.value.message
    fits = re.search(
        r"what would fit: (\d) of its 3 rounds at this noise, or all of them with "
        r"privacy.epsilon: ([0-9.]+) \(a noise multiplier of ([0-9.]+)\)",
        caught.value.hint,
    )
    count, epsilon, noise = int(fits[1]), float(fits[2]), float(fits[3])
    assert 1 <= count < rounds
    ledger.foresee("data", "record", asked, count, BUDGET)
    with pytest.raises(BudgetExceeded):
        ledger.foresee("data", "record", asked, count + 1, BUDGET)
    smaller = calibrate(epsilon, 1e-5, 1.0, 5 * rounds)  # what such a study would choose
    assert smaller == pytest.approx(noise, rel=0.02)
    for multiplier in (noise, smaller):
        ledger.foresee("data", "record", [Gaussian(multiplier, 5)], rounds, BUDGET)


def test_where_more_noise_does_not_help_only_fewer_rounds_are_offered(ledger):
    """The tight filter of a sampled mechanism charges every release as the first one."""
    asked = [PoissonGaussian(0.05, 0.9, 60)]
    reserve(ledger, events=[PoissonGaussian(0.05, 0.9, 250)], run="earlier")
    with pytest.raises(BudgetExceeded) as caught:
        ledger.foresee("data", "record", asked, 3, BUDGET)
    assert caught.value.hint == "what would fit: 1 of its 3 rounds at this noise"
    ledger.foresee("data", "record", asked, 1, BUDGET)
    reserve(ledger, events=[PoissonGaussian(0.05, 0.9, 110)], run="last")
    with pytest.raises(BudgetExceeded) as caught:
        ledger.foresee("data", "record", asked, 3, BUDGET)
    assert "no release of this kind fits any more" in caught.value.hint


def test_a_release_past_the_budget_is_refused_and_nothing_is_written(ledger):
    def reserve_until_refused():
        for round_ in range(1000):
            reserve(ledger, round_, events=[Gaussian(2.0, 2)])

    with pytest.raises(BudgetExceeded) as caught:
        reserve_until_refused()
    grants = len(ledger.entries())
    assert grants > 0
    assert claim([Gaussian(2.0, 2 * grants)], TIGHT_SHARE * 1e-5).epsilon <= 8.0
    assert claim([Gaussian(2.0, 2 * grants + 2)], TIGHT_SHARE * 1e-5).epsilon > 8.0
    assert len(ledger.rows()) == grants
    message, hint = caught.value.message, caught.value.hint
    spent = ledger.spent("data", "record", 1e-5).claim.epsilon
    assert message.startswith(f"sum {grants + 1} of record data: ")
    assert f"{spent:.2f}" in message
    assert "of 8 is spent" in message
    assert "nothing was released" in message
    assert "noise multiplier of" in hint


def test_what_the_hint_says_would_fit_does_fit(ledger):
    reserve(ledger, events=[Gaussian(8.0, 20)])
    with pytest.raises(BudgetExceeded) as caught:
        reserve(ledger, 1, events=[Gaussian(8.0, 400)])
    steps = int(caught.value.hint.split("fit: ")[1].split(" of its 400")[0])
    noise = float(caught.value.hint.rsplit(" ", 1)[1])
    assert 0 < steps < 400
    with pytest.raises(BudgetExceeded):
        reserve(ledger, 1, events=[Gaussian(8.0, steps + 1)])
    ledger.void(reserve(ledger, 1, events=[Gaussian(noise, 400)]))
    reserve(ledger, 2, events=[Gaussian(8.0, steps)])


def test_a_calibrated_plan_spends_its_budget_to_the_last_round(ledger):
    """The filter must not be so loose that the last planned round is refused."""
    from securefedcollm.privacy.accounting import calibrate

    z = calibrate(3.0, 1e-5, 0.05, 60)
    for round_ in range(4):
        reserve(ledger, round_, events=[PoissonGaussian(0.05, z, 15)], budget=(3.0, 1e-5))
    with pytest.raises(BudgetExceeded):
        reserve(ledger, 4, events=[PoissonGaussian(0.05, z, 15)], budget=(3.0, 1e-5))


def test_the_budget_is_kept_across_runs_but_not_across_data_sets(ledger):
    half = [Gaussian(1.2, 3)]
    reserve(ledger, events=half, run="first")
    with pytest.raises(BudgetExceeded):
        reserve(ledger, events=half, run="second")
    reserve(ledger, events=half, run="second", dataset="other")


def test_a_void_reservation_frees_its_budget(ledger):
    most = [Gaussian(1.2, 3)]
    first = reserve(ledger, events=most)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, 1, events=most)
    ledger.void(first)
    reserve(ledger, 1, events=most)


@pytest.mark.parametrize(
    "budget",
    [(0.0, 1e-5), (8.0, 0.0), (8.0, 1.0), (float("nan"), 1e-5), (float("inf"), 1e-5)],
)
def test_impossible_budgets(ledger, budget):
    with pytest.raises(ConfigError):
        reserve(ledger, budget=budget)
    with pytest.raises(LocalProtocolError):
        reserve(ledger, events=[])


# --- crashes and races --------------------------------------------------------------------------


def test_kill_9_before_every_statement(tmp_path):
    """Whatever a life was told before it was killed is in the file, and nothing is free."""
    planned, budget = [Gaussian(2.0, 3)], (20.0, 1e-5)  # as in ledger_crash.py
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "ledger_crash.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    assert not lives[-1]["killed"]
    assert len(lives) > 12
    reached = set()
    for life in lives:
        told = life["told"]
        with Ledger(tmp_path / f"{life['k']}.db", "north") as ledger:
            ledger.verify()
            entries = ledger.entries()
            state = entries[0].state if entries else None
            reached.add((tuple(told), state))
            order = [None, "reserved", "released", "settled"]
            assert order.index(state) >= min(len(told), 3)
            if state in ("reserved", "released"):
                assert counted(ledger) == tuple(planned)
            if "second" in told:
                assert len(entries) == 2
            if state == "released":
                with pytest.raises(LocalProtocolError):
                    ledger.reserve("data", "record", "run", 0, 0, planned, budget)
    assert {state for _, state in reached} == {None, "reserved", "released", "settled"}


@pytest.mark.soak
def test_two_processes_cannot_both_reserve_the_last_epsilon(tmp_path):
    others = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "ledger_race.py"), str(tmp_path), name],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    grants = [int(process.communicate(timeout=120)[0]) for process in others]
    total = sum(grants)
    assert claim([Gaussian(2.0, total)], TIGHT_SHARE * 1e-5).epsilon <= 8.0
    assert claim([Gaussian(2.0, total + 1)], TIGHT_SHARE * 1e-5).epsilon > 8.0
    with Ledger(tmp_path / "ledger.db", "north") as ledger:
        ledger.verify()
        assert len(ledger.entries()) == total


def test_a_ledger_that_another_process_is_just_creating_is_waited_for(tmp_path):
    path = tmp_path / "ledger.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # SQLite answers the change into WAL at once: locked
    release = threading.Timer(0.2, other.execute, ["COMMIT"])
    release.start()
    with Ledger(path, "north") as ledger:
        ledger.reserve("data", "record", "run", 0, 0, [Gaussian(2.0)], (8.0, 1e-5))
    release.join()
    other.close()


# --- the paper ----------------------------------------------------------------------------------


def write_behind(path: Path, sql: str, *values: object) -> None:
    """Adversary: the file's owner, later, with an SQLite shell."""
    db = sqlite3.connect(path)
    for trigger in ("journal_keep", "journal_hold"):
        db.execute(f"DROP TRIGGER IF EXISTS {trigger}")
    db.execute(sql, values)
    db.commit()
    db.close()


def filled(path: Path) -> Head:
    with Ledger(path, "north") as ledger:
        for round_ in range(3):
            reservation = reserve(ledger, round_)
            ledger.release(reservation)
            ledger.settle(reservation, STEP)
        return ledger.head


def quieter(path: Path, seq: int) -> bytes:
    db = sqlite3.connect(path)
    (body,) = db.execute("SELECT body FROM journal WHERE seq = ?", (seq,)).fetchone()
    db.close()
    content = json.loads(body)
    content["events"][0]["steps"] = 1
    return rfc8785.dumps(content)


@pytest.mark.parametrize("seq", [1, 4, 9])
def test_an_edited_row_is_named(path, seq):
    filled(path)
    edit = quieter(path, seq) if seq != 9 else b"{}"
    write_behind(path, "UPDATE journal SET body = ? WHERE seq = ?", edit, seq)
    with pytest.raises(EvidenceError, match=f"row {seq} .*does not match its digest"):
        Ledger(path, "north")


def test_an_edited_row_with_its_digest_made_to_fit_breaks_the_chain(path):
    filled(path)
    edit = quieter(path, 4)
    write_behind(path, "UPDATE journal SET body = ?, digest = ? WHERE seq = 4", edit, sha256(edit))
    with pytest.raises(EvidenceError, match=r"row 5 .*does not follow"):
        Ledger(path, "north")


def test_a_deleted_row_is_missed(path):
    filled(path)
    write_behind(path, "DELETE FROM journal WHERE seq = 4")
    with pytest.raises(EvidenceError, match=r"row 4 .*missing"):
        Ledger(path, "north")


def test_rows_cut_off_the_end_are_missed_by_an_anchor(path):
    """The chain alone cannot show it; that is what the anchor in the evidence log is for."""
    head = filled(path)
    write_behind(path, "DELETE FROM journal WHERE seq > 6")
    with Ledger(path, "north") as ledger:
        ledger.verify()
        with pytest.raises(EvidenceError, match=r"row 9 .*anchored"):
            ledger.verify(head)


def test_a_whole_rewrite_is_missed_by_an_anchor(path, tmp_path):
    head = filled(path)
    other = tmp_path / "other.db"
    with Ledger(other, "north") as ledger:
        for round_ in range(9):
            reserve(ledger, round_, events=[Gaussian(50.0)])
        ledger.verify()
        with pytest.raises(EvidenceError, match="anchored"):
            ledger.verify(head)
    with Ledger(path, "north") as ledger:
        early = Head(2, ledger.rows()[1].digest)
        assert ledger.verify(early, head) == head


def test_an_edit_while_the_ledger_is_open_stops_the_next_reservation(ledger, path):
    reserve(ledger)
    edit = quieter(path, 1)
    write_behind(path, "UPDATE journal SET body = ?, digest = ?", edit, sha256(edit))
    with pytest.raises(EvidenceError, match="changed while"):
        reserve(ledger, 1)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"action": "settle"}, "not a ledger entry"),
        ({"action": "reserve", "round": 5, "events": []}, "reserve of nothing"),
        ({"action": "forgive"}, "not a ledger entry"),
        ({"action": "void", "round": 7}, "out of order"),
        ({"action": "settle", "events": [{"kind": "gaussian", "noise_multiplier": 9.0}]}, "order"),
        ({"action": "reserve", "round": 5}, "not a ledger entry"),
    ],
)
def test_a_well_chained_row_must_still_make_sense(ledger, path, content, what):
    """Adversary: appends rows with correct hashes, say a void of a released entry."""
    reserve(ledger)
    body = dict(ledger.rows()[0].body)
    for name in ("events", "budget"):
        body.pop(name)
    body |= {**content, "seq": 2, "previous": ledger.head.digest.hex()}
    raw = rfc8785.dumps(body)
    write_behind(path, "INSERT INTO journal VALUES (2, ?, ?)", raw, sha256(raw))
    with pytest.raises(EvidenceError, match=what):
        ledger.verify()


def test_the_database_itself_refuses_edits(ledger, path):
    reserve(ledger)
    db = sqlite3.connect(path)
    for sql in ("UPDATE journal SET body = x'00'", "DELETE FROM journal"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(sql)
    db.close()


def test_another_owners_ledger_is_refused(ledger, path):
    reserve(ledger)
    with pytest.raises(EvidenceError, match="another owner"):
        Ledger(path, "south")


def test_files_are_for_their_owner_only(ledger, path):
    reserve(ledger)
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file


def test_durability_settings(ledger):
    db = ledger._journal._db
    assert db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("make", ["directory", "garbage"])
def test_a_file_that_is_no_ledger_is_a_state_error(tmp_path, make):
    target = tmp_path / "ledger.db"
    if make == "directory":
        target.mkdir()
    else:
        target.write_bytes(b"not a database" * 100)
    with pytest.raises(StateError, match="cannot be used") as caught:
        Ledger(target, "north")
    assert caught.value.hint
