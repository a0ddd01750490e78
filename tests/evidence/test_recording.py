"""What the two round loops write down, that it survives them, and what silos do not vouch for."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing

import msgspec
import pytest
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import EvidenceError, ProtocolError
from securefedcollm.evidence.bundle import BEST, file_digests, make_bundle
from securefedcollm.evidence.entries import (
    Agreed,
    Finished,
    Opening,
    Reserved,
    Settled,
    Summed,
    Uploaded,
    decode_entry,
    encode_entry,
)
from securefedcollm.evidence.ledger import check_anchors
from securefedcollm.evidence.merkle import consistency_proof, inclusion_proof
from securefedcollm.evidence.note import origin, sign_checkpoint
from securefedcollm.federation import runstore
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.keeping import best_round
from securefedcollm.federation.messages import (
    Aggregate,
    BeginRound,
    MakeKey,
    Refused,
    Shown,
    Trained,
    Witness,
    Witnessed,
    decode_reply,
    decode_request,
    encode,
)
from securefedcollm.federation.plan import AUTHORITY
from securefedcollm.federation.records import MOST_HEADS
from securefedcollm.federation.workload import silent
from securefedcollm.primitives import merkle_root
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import digest
from tests.support.arithmetic import SIZE
from tests.support.rounds import Cut, Dies, Killed, expected_theta
from tests.support.runs import (
    ALL_KEYS,
    JOINT,
    KEYS,
    NAMES,
    SERVER_KEY,
    SILO_PRIVACY,
    RecordedRun,
    kinds,
    make_silo,
    recorded_study,
    server_log,
    silo_log,
)

SERVER_ROUND = ["round", "opening", "summed", "finished"]
SILO_ROUND = [
    *("round", "reserved", "released", "settled"),
    *("uploaded", "agreed", "unmasked", "witnessed"),
]


def test_every_participant_writes_its_log_and_silos_vouch_for_the_server_s(tmp_path):
    study = recorded_study()
    RecordedRun(tmp_path, study).go()
    log = server_log(tmp_path, study)
    assert kinds(log) == ["opened", *SERVER_ROUND * 3]
    for name in NAMES:
        mine = silo_log(tmp_path, study, name)
        assert kinds(mine) == ["opened", *SILO_ROUND * 3]
        mine.head.verify(KEYS[name].public)
        assert mine.entries[-5].what.spent.epsilon < 8  # said with the last round
        for head in log.heads():
            head.verify(SERVER_KEY.public)
            head.verify_cosigned(origin(digest(study), name), KEYS[name].public)
    assert [head.size for head in log.heads()] == [5, 9, 13]


def test_the_silo_unit_settles_with_the_survivors(tmp_path):
    study = recorded_study(privacy=SILO_PRIVACY)
    RecordedRun(tmp_path, study, wrap=lambda e: Cut(e, ("silo-2",), 9)).go()
    entries = [e.what for e in silo_log(tmp_path, study, "silo-1").entries]
    settled = [what for what in entries if isinstance(what, Settled)]
    assert [(s.round, s.events[0]["shares"]) for s in settled] == [(0, 4), (1, 3), (2, 3)]
    assert settled[-1].spent is not None


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", [0, 3, 5, 6, 7])
def test_killed_at_any_exchange_the_logs_go_on(tmp_path, at, before):
    """Exchange 6 collects cosignatures, 7 brings the adapter. All processes die; each participant
    keeps its directory."""
    study = recorded_study(rounds=2)
    with pytest.raises(Killed):
        RecordedRun(tmp_path, study, wrap=lambda e: Dies(e, at, before)).go()
    before_kill = server_log(tmp_path, study).leaves
    theta = RecordedRun(tmp_path, study, resume=True).go()
    assert (theta == expected_theta(study)).all()
    log = server_log(tmp_path, study)
    assert log.leaves[: len(before_kill)] == before_kill
    finished = [e.what.round for e in log.entries if isinstance(e.what, Finished)]
    assert finished == [0, 1]
    assert kinds(log).count("opened") == 1
    sums = {e.what.round: e.what.sum for e in log.entries if isinstance(e.what, Summed)}
    assert len(sums) == 2
    for name in NAMES:
        mine = silo_log(tmp_path, study, name)
        with Ledger(tmp_path / "silos" / name / "ledger.sqlite", name) as ledger:
            assert check_anchors(mine, ledger) >= 6


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("at", [3, 8, 11, 15, 20])
def test_killed_at_any_exchange_the_best_round_and_the_end_are_the_same(tmp_path, at, joint):
    """What was measured is in the round's record: patience does not begin anew."""
    plan = JOINT if joint else {}
    study = recorded_study(**plan | {"rounds": 5, "keep": {"patience": 2}})
    losses = (0.4, 0.5, 0.45, 0.1, 0.1)
    whole = RecordedRun(tmp_path / "whole", study, losses=losses)
    whole.go()
    with pytest.raises(Killed):
        RecordedRun(tmp_path / "cut", study, losses=losses, wrap=lambda e: Dies(e, at, True)).go()
    cut = RecordedRun(tmp_path / "cut", study, resume=True, losses=losses)
    cut.go()
    for run in (whole, cut):
        assert len(run.store.state.history) == 3
        assert best_round(study, run.store.state.history) == 1
    kept = [file_digests(tmp_path / name / BEST) for name in ("whole", "cut")]
    # The noise of a joint step is drawn anew; all else follows from the study.
    ends = [e.what for e in server_log(tmp_path / "cut", study).entries]
    first = next(what for what in ends if isinstance(what, Finished))
    assert kept[1] == first.files
    assert joint or kept[0] == kept[1]
    (tmp_path / "cut.zip").write_bytes(make_bundle(tmp_path / "cut"))
    assert verify(tmp_path / "cut.zip").failed == []


def test_killed_while_the_best_round_is_saved_it_is_saved_again(tmp_path, monkeypatch):
    study = recorded_study(rounds=3, keep={})
    losses = (0.5, 0.4, 0.45)
    write = runstore.write_durably

    def dies(path, content):
        copied = path.parent / "best-00002" / "slm" / "theta.npy"
        if copied.exists():  # the copy is there, and no state points at it yet
            copied.write_bytes(b"half")
            raise Killed
        write(path, content)

    monkeypatch.setattr(runstore, "write_durably", dies)
    with pytest.raises(Killed):
        RecordedRun(tmp_path, study, losses=losses).go()
    monkeypatch.undo()
    RecordedRun(tmp_path, study, resume=True, losses=losses).go()
    ends = [e.what for e in server_log(tmp_path, study).entries if isinstance(e.what, Finished)]
    assert [what.score for what in ends] == [0.5, 0.4, 0.45]
    assert file_digests(tmp_path / BEST) == ends[1].files


class Reads:
    """An engine that looks into the logs whenever something is about to leave."""

    def __init__(self, engine, directory, study):
        self.engine, self.directory, self.study = engine, directory, study
        self.looked = 0

    def exchange(self, frames, timeout):
        inner = decode_request(next(iter(frames.values())))
        replies = self.engine.exchange(frames, timeout)
        if isinstance(inner, Aggregate) and b"opening" in inner.frame[:16]:
            assert kinds(server_log(self.directory, self.study))[-1] == "opening"
            for name in NAMES:
                assert kinds(silo_log(self.directory, self.study, name))[-1] == "unmasked"
            self.looked += 1
        if isinstance(inner, Aggregate) and b"delivery" in inner.frame[:16]:
            for name in NAMES:  # the upload waits in ``replies``: charged and written down
                assert kinds(silo_log(self.directory, self.study, name))[-4:] == [
                    *("reserved", "released", "settled", "uploaded")
                ]
            self.looked += 1
        return replies


def test_what_leaves_is_on_disk_before(tmp_path):
    study = recorded_study(rounds=2)
    readers = []

    def wrap(engine):
        readers.append(Reads(engine, tmp_path, study))
        return readers[-1]

    RecordedRun(tmp_path, study, wrap=wrap).go()
    assert readers[0].looked == 4


def test_a_silo_that_cannot_write_its_log_says_nothing(tmp_path):
    study = recorded_study(rounds=1)
    run = RecordedRun(tmp_path, study)
    for name in NAMES:  # a full disk, as SQLite sees it
        run.engine._local[name]._evidence._log._db.execute("PRAGMA query_only = ON")
    with pytest.raises(ProtocolError, match="0 of 4 silos delivered an update"):
        run.go()
    assert kinds(silo_log(tmp_path, study, "silo-1")) == []


def test_refusals_are_written_once_and_without_their_reasons(tmp_path):
    study = recorded_study()
    run = RecordedRun(tmp_path, study, fails=("silo-3",))
    run.go()
    log = silo_log(tmp_path, study, "silo-3")
    assert kinds(log)[1:6] == ["round", "reserved", "released", "settled", "refused"]
    assert not re.search(rb"finite|learning_rate", b"".join(log.leaves))
    silo = run.engine._local["silo-3"]
    for _ in range(50):
        silo.step(b"garbage")
        silo._evidence.refused(EvidenceError("of another kind"))
    assert silo._evidence._log.size <= log.size + 2


def test_an_old_ledger_file_is_found_out(tmp_path):
    """Adversary: an operator who restores the file of before round 2 to have its budget back."""
    study = recorded_study(rounds=2)
    path = tmp_path / "silos" / "silo-1" / "ledger.sqlite"
    with pytest.raises(Killed):
        RecordedRun(tmp_path, study, wrap=lambda e: Dies(e, 7, True)).go()
    old = tmp_path / "old.sqlite"
    source, target = sqlite3.connect(path), sqlite3.connect(old)
    source.backup(target)
    target.close()
    RecordedRun(tmp_path, study, resume=True).go()
    log = silo_log(tmp_path, study, "silo-1")
    with Ledger(path, "silo-1") as ledger:
        assert check_anchors(log, ledger) == 6
    with (
        Ledger(old, "silo-1") as ledger,
        pytest.raises(EvidenceError, match=r"does not contain what silo-1#\d+ \(reserved\)"),
    ):
        check_anchors(log, ledger)


def begin(round_=0, attempt=0):
    return encode(BeginRound(b"r" * 16, round_, attempt, b"l" * 32, bytes(4 * SIZE)))


def make_key(round_=0, attempt=0):
    return encode(MakeKey(b"r" * 16, round_, attempt, b"m" * 32, SIZE))


@pytest.mark.parametrize("who", ["silo-1", AUTHORITY])
@pytest.mark.parametrize("how", ["lost", "of before the round", "of before the attempt"])
def test_a_journal_from_a_backup_is_found_out(tmp_path, caplog, who, how):
    """Adversary: a server that has one round opened for other silos than the journal's former life
    knows of. The evidence log is newer; the participant is out of this run for good."""
    plan = {"clip_norm": 20.0, "scheme": "ckks", "key_model": "authority"}
    study = recorded_study(aggregation=plan)
    ask = make_key if who == AUTHORITY else begin
    home = tmp_path / AUTHORITY if who == AUTHORITY else tmp_path / "silos" / who

    def live():
        return make_silo(who, silent, study=study, directory=tmp_path)

    def answers(session, frame):
        return not isinstance(decode_reply(session.step(frame), who), Refused)

    first = live()
    assert answers(first, ask())
    old = sqlite3.connect(":memory:")
    if how == "of before the round":
        sqlite3.connect(home / "silo.sqlite").backup(old)
    assert answers(live(), ask(1))  # restarted
    if how == "of before the attempt":
        sqlite3.connect(home / "silo.sqlite").backup(old)
    assert answers(live(), ask(1, 1))
    with closing(sqlite3.connect(home / "silo.sqlite")) as journal:
        old.backup(journal)
    again = live()
    for number in (1, 2):  # whatever round the server says it is
        assert not answers(again, ask(number, 2))
    assert "its evidence log knows of 2 attempt(s) at round 2, but the journal" in caplog.text
    assert "sits the study out" in caplog.text


def test_a_home_rebuilt_from_identity_and_ledger_sits_the_study_out(tmp_path, caplog):
    """What a backup brings back. The ledger knows of the run; the others go on without the silo."""
    study = recorded_study()
    with pytest.raises(Killed):
        RecordedRun(tmp_path, study, wrap=lambda e: Dies(e, 9, True)).go()
    home = tmp_path / "silos" / "silo-4"
    for path in home.iterdir():
        if not path.name.startswith("ledger"):
            path.unlink()
    run = RecordedRun(tmp_path, study, resume=True)
    run.go()
    assert "its privacy ledger knows of 1 attempt(s) at round 2, but the" in caplog.text
    assert [r["survivors"] for r in run.store.state.history[1:]] == [list(NAMES[:3])] * 2
    assert "this silo cannot take part" in run.store.state.history[1]["dropouts"]["silo-4"]


def test_a_study_s_ledger_of_another_run_is_no_mark(tmp_path):
    """The same records in an earlier study, and in an earlier run whose state was removed whole."""
    for seed in (1, 2):
        silo = make_silo("silo-1", silent, study=recorded_study(seed=seed), directory=tmp_path)
        assert isinstance(decode_reply(silo.step(begin()), "silo-1"), Trained)
        for path in (tmp_path / "silos" / "silo-1").glob("evidence*"):
            path.unlink()


# --- What silos refuse to vouch for ---------------------------------------------------------------


@pytest.fixture
def midway(tmp_path):
    """silo-1 after round 1 of 2, and the server's leaves; nobody has vouched for anything."""
    study = recorded_study(rounds=2)
    with pytest.raises(Killed):
        RecordedRun(tmp_path, study, wrap=lambda e: Dies(e, 6, True)).go()
    silo = make_silo("silo-1", silent, study=study, directory=tmp_path)
    return study, silo, server_log(tmp_path, study).leaves


def ask(study, leaves, old=0, key=SERVER_KEY, name="server", **changes):
    """What an adversary with the server's key can ask silo-1 to vouch for."""
    shown = [i for i, leaf in enumerate(leaves) if b'"kind":"opening"' in leaf]
    head = sign_checkpoint(origin(digest(study), name), key, len(leaves), merkle_root(leaves))
    request = Witness(
        checkpoint=head.note,
        old=old,
        consistency=consistency_proof(leaves, old),
        openings=[Shown(i, leaves[i], inclusion_proof(leaves, i)) for i in shown],
    )
    return encode(msgspec.structs.replace(request, **changes))


def answer(silo, frame):
    return decode_reply(silo.step(frame), "silo-1")


def forged(leaves, kind, **changes):
    """The log with the fields of one kind of entry changed."""
    made = []
    for leaf in leaves:
        entry = decode_entry(leaf, "here")
        if isinstance(entry.what, kind):
            changed = msgspec.structs.replace(entry.what, **changes)
            entry = msgspec.structs.replace(entry, what=changed)
        made.append(encode_entry(entry))
    return made


def test_a_silo_vouches_for_what_agrees_with_its_own_log_and_only_for_what_extends_it(midway):
    study, silo, leaves = midway
    reply = answer(silo, ask(study, leaves))
    assert isinstance(reply, Witnessed)
    assert reply.cosignature
    # A server that forgot is told from where to prove; one that rewrote history cannot.
    assert answer(silo, ask(study, leaves)) == Witnessed(len(leaves), b"")
    longer = [*leaves, leaves[-1]]
    rewritten = [leaves[0].replace(b"server", b"sErver", 1), *longer[1:]]
    refusal = answer(silo, ask(study, rewritten, old=len(leaves)))
    assert "does not extend" in refusal.message
    assert answer(silo, ask(study, longer, old=len(leaves))).cosignature


@pytest.mark.parametrize(
    ("forge", "changes", "message"),
    [
        (("survivors", ["silo-1", "silo-2", "silo-3"]), {}, "names other survivors"),
        (None, {"openings": []}, "hides or alters the opening of sum 1"),
        (None, {"openings": [Shown(2, b"{}", [])]}, "is not in the log"),
        (None, {"name": "silo-2"}, "is of another log"),
        (None, {"key": ALL_KEYS["silo-2"]}, "no signature by"),
        (None, {"checkpoint": "nonsense"}, "well-formed signed note"),
    ],
)
def test_a_silo_does_not_vouch_for(midway, forge, changes, message):
    """Adversary: the server, with its own key, after silo-1 opened the sum of round 1."""
    study, silo, leaves = midway
    if forge is not None:
        leaves = forged(leaves, Opening, **dict([forge]))
    refusal = answer(silo, ask(study, leaves, **changes))
    assert isinstance(refusal, Refused)
    assert message in refusal.message


def test_a_lie_about_the_opened_round_is_refused_under_any_header(midway):
    study, silo, leaves = midway
    lie = forged(leaves, Opening, header="0" * 64, survivors=["silo-1", "silo-2", "silo-3"])
    assert "hides or alters the opening of sum 1" in answer(silo, ask(study, lie)).message


@pytest.mark.parametrize("hidden", ["replaced", "beside another"])
def test_a_later_opening_hides_no_opening_that_the_silo_took_part_in(midway, hidden):
    """Adversary: a server that shows an opening of a later round, in which the silo was absent, so
    that the silo does not ask for the one that it helped to make."""
    study, silo, leaves = midway
    (opening,) = (decode_entry(leaf, "here") for leaf in leaves if b'"kind":"opening"' in leaf)
    later = msgspec.structs.replace(opening.what, round=1, header="0" * 64)
    made_up = encode_entry(msgspec.structs.replace(opening, seq=len(leaves), what=later))
    honest = [*leaves, made_up]
    log = forged(leaves, Opening, round=1, header="0" * 64) if hidden == "replaced" else honest
    request = ask(study, log)
    if hidden == "beside another":  # it is in the log, and not among what is shown
        shown = [Shown(len(leaves), made_up, inclusion_proof(honest, len(leaves)))]
        request = ask(study, log, openings=shown)
    assert "hides or alters the opening of sum 1" in answer(silo, request).message
    assert answer(silo, ask(study, honest)).cosignature  # both are shown


class Unasked:
    """An engine that has silo-4 in round 1 alone, and at the end to be asked to vouch."""

    def __init__(self, engine):
        self.engine, self.count = engine, 0

    def exchange(self, frames, timeout):
        self.count += 1
        gone = [] if self.count <= 6 or self.count >= 14 else ["silo-4"]
        here = {name: frame for name, frame in frames.items() if name not in gone}
        return self.engine.exchange(here, timeout) | dict.fromkeys(gone, Failure("away"))


def test_an_honest_server_shows_a_silo_every_opening_since_it_last_vouched(tmp_path):
    study = recorded_study(rounds=2)
    RecordedRun(tmp_path, study, wrap=Unasked).go()
    assert kinds(silo_log(tmp_path, study, "silo-4"))[-2:] == ["unmasked", "witnessed"]
    server_log(tmp_path, study).head.verify_cosigned(
        origin(digest(study), "silo-4"), KEYS["silo-4"].public
    )


def test_a_silo_vouches_for_so_many_heads_between_two_attempts_and_no_more(midway):
    """Adversary: a server that fills the disk of a silo with heads of a log that only grows."""
    study, silo, leaves = midway
    first = len(leaves)
    for size in range(first, first + MOST_HEADS):
        reply = answer(silo, ask(study, leaves, old=size - 1 if size > first else 0))
        assert reply.cosignature
        leaves = [*leaves, leaves[-1]]
    size = silo._evidence._log.size
    refusal = answer(silo, ask(study, leaves, old=len(leaves) - 1))
    assert "more than 64 heads" in refusal.message
    assert silo._evidence._log.size <= size + 1  # the refusal
    # The head that it vouched for last may be asked for again: a server that lost the reply.
    assert answer(silo, ask(study, leaves[:-1], old=len(leaves) - 1)).cosignature


class Late:
    """An engine without silo-4 until its silos were asked to vouch for the first time."""

    def __init__(self, engine):
        self.engine = engine
        self.vouched = False

    def exchange(self, frames, timeout):
        asked = isinstance(decode_request(frames["silo-1"]), Witness)
        if asked or self.vouched:
            self.vouched = True
            return self.engine.exchange(frames, timeout)
        here = {name: frame for name, frame in frames.items() if name != "silo-4"}
        return self.engine.exchange(here, timeout) | {"silo-4": Failure("away")}


def test_a_silo_that_comes_later_begins_its_log_with_the_round_that_it_saw(tmp_path):
    """Asked to vouch before its first round, it would have begun with a head instead."""
    study = recorded_study(rounds=2)
    RecordedRun(tmp_path, study, wrap=Late).go()
    assert kinds(silo_log(tmp_path, study, "silo-4")) == ["opened", *SILO_ROUND]
    (tmp_path / "evidence.zip").write_bytes(make_bundle(tmp_path))
    assert verify(tmp_path / "evidence.zip").failed == []


class Away:
    """An engine that loses silo-4 while the round goes on, and has it back to be asked to vouch."""

    def __init__(self, engine):
        self.engine = engine

    def exchange(self, frames, timeout):
        if isinstance(decode_request(next(iter(frames.values()))), Witness):
            return self.engine.exchange(frames, timeout)
        here = {name: frame for name, frame in frames.items() if name != "silo-4"}
        gone = {name: Failure("away") for name in frames if name == "silo-4"}
        return self.engine.exchange(here, timeout) | gone


@pytest.mark.parametrize("rounds", [1, 2])
def test_an_honest_server_that_lost_a_round_is_vouched_for(tmp_path, rounds):
    """All four opened, the server died, and silo-4 stayed away: the others agree to a sum of three
    and refuse to open it. Both openings are in the server's log; everybody knows one of them."""
    study = recorded_study(rounds=rounds)
    with pytest.raises(Killed):
        RecordedRun(tmp_path, study, wrap=lambda e: Dies(e, 5, before=False)).go()
    RecordedRun(tmp_path, study, resume=True, wrap=Away).go()
    log = server_log(tmp_path, study)
    assert kinds(log)[:6] == ["opened", "round", "opening", "round", "opening", "failed"]
    assert "lost" in kinds(log)
    for name in NAMES:
        log.head.verify_cosigned(origin(digest(study), name), KEYS[name].public)
    (tmp_path / "evidence.zip").write_bytes(make_bundle(tmp_path))
    verdict = verify(tmp_path / "evidence.zip")
    assert verdict.failed == []
    (found,) = [result.evidence for result in verdict.results if result.name == "lost"]
    assert found.endswith("enough silos answered to open round 1: count it as released")


def test_logs_of_silos_and_server_name_the_same_transcripts(tmp_path):
    study = recorded_study(rounds=1)
    RecordedRun(tmp_path, study).go()
    (opening,) = [
        e.what for e in server_log(tmp_path, study).entries if isinstance(e.what, Opening)
    ]
    for name in NAMES:
        entries = silo_log(tmp_path, study, name).entries
        (agreed,) = [e.what for e in entries if isinstance(e.what, Agreed)]
        (uploaded,) = [e.what for e in entries if isinstance(e.what, Uploaded)]
        assert (agreed.header, agreed.lists) == (opening.header, opening.lists)
        assert uploaded.delivery == opening.delivery


def test_a_run_under_a_larger_pinned_budget_leaves_evidence_that_verifies(tmp_path):
    """The log says what is pinned; the study's own ε is what its charges keep to."""
    study = recorded_study()
    for name in NAMES:
        with Ledger(tmp_path / "silos" / name / "ledger.sqlite", name) as ledger:
            ledger.pin(20.0, 1e-4)
    RecordedRun(tmp_path, study).go()
    entries = [e.what for e in silo_log(tmp_path, study, "silo-1").entries]
    assert {(w.epsilon, w.delta) for w in entries if isinstance(w, Reserved)} == {(20.0, 1e-4)}
    path = tmp_path / "evidence.zip"
    path.write_bytes(make_bundle(tmp_path))
    assert verify(path).failed == []
