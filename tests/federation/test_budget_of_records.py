"""A silo's file, its studies, and the one budget that its records have.

Adversary: the author of the next study, and an operator who edits the file a little every day.
"""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from securefedcollm.errors import BudgetExceeded, ConfigError, StateError
from securefedcollm.evidence.ledger import LoggedLedger
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation import consent, roles
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.cotuning import SiloTuning, contents_of
from securefedcollm.federation.dealing import read_records
from securefedcollm.federation.files import make_directory
from securefedcollm.federation.messages import Refused, Trained
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.silostore import SiloStore, SumMemory
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.accounting import calibrate
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.privacy.ledger import Budget, Ledger
from securefedcollm.study import digest, load_study
from securefedcollm.tuning.data import read_questions
from securefedcollm.tuning.splits import dataset_fingerprint
from tests.support.arithmetic import KEYS, ROSTER, ArithmeticSilo, make_study, silo_record
from tests.support.inputs import make_inputs
from tests.support.members import make_identities, write_signed
from tests.support.rounds import begin, reply_to

RATE, STEPS, ROUNDS = 0.1, 5, 3
PRIVACY = {"epsilon": 8.0, "delta": 1e-5}


class FileSilo(ArithmeticSilo):
    """What ``SiloTuning`` is to the ledger, of a real file, without a model."""

    def __init__(self, study, path, questions=None):
        super().__init__("silo-1")
        self.study = study
        self.questions = read_records(study, path) if questions is None else list(questions)
        self.records = len(self.questions)
        plain = [replace(question, subject=None) for question in self.questions]
        self.dataset = dataset_fingerprint(self.questions if study.subject else plain)
        self.also = [dataset_fingerprint(plain)] if study.subject else []

    def contents(self):
        return contents_of(self.questions)

    def events(self):
        privacy = self.study.privacy
        if privacy.unit == "silo":
            return ()
        noise = calibrate(privacy.epsilon, privacy.delta, RATE, STEPS * ROUNDS)
        return (PoissonGaussian(RATE, noise, STEPS),)


def task(**changes):
    files = {"train": "a.jsonl", "test": "b.jsonl", "public": 4, "per_silo": 12}
    kind = {"kind": "classification", "labels": ["benign", "malign"]}
    return {"data": files | {"public_labelled": 4}} | kind | changes


def a_study(name="first", **changes):
    return make_study(**({"study": name, "task": task(), "privacy": PRIVACY} | changes))


def session(study, path, home):
    store = SiloStore(home / study.digest.hex()[:12])
    ledger = Ledger(home / "ledger.sqlite", "silo-1")
    return SiloSession(
        Seat(study, "silo-1", ROSTER, KEYS["silo-1"]),
        ChargedTraining(study, "silo-1", FileSilo(study, path), store, ledger),
        silo_record("silo-1"),
    )


ROWS = [
    {"text": f"finding {i} of the slide", "label": ["benign", "malign"][i % 2], "patient": f"p{i}"}
    for i in range(12)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reordered(rows):
    return random.Random(1).sample(rows, len(rows))


@pytest.fixture
def spent(tmp_path):
    """A home whose ledger has spent the whole budget on ``records.jsonl``."""
    path = write(tmp_path / "records.jsonl", ROWS)
    silo = session(a_study(), path, tmp_path)
    for round_ in range(ROUNDS):
        assert isinstance(reply_to(silo, begin(round_)), Trained)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "edit"),
    [
        ({"study": "second"}, list),
        ({"privacy": PRIVACY | {"epsilon": 24.0}}, list),
        ({"privacy": PRIVACY | {"delta": 1e-2}}, list),
        ({"privacy": PRIVACY | {"delta": 1e-6}}, list),
        ({"privacy": PRIVACY | {"unit": "subject", "subject": "patient"}}, list),
        ({"privacy": PRIVACY | {"unit": "silo", "noise": "distributed"}, "aggregation": {}}, list),
        ({"task": task(kind="text", labels=[]), "distillation": {"over": "answer"}}, list),
        ({"task": task(labels=["benign", "malign", "unsure"])}, list),
        ({"task": task(labels=["malign", "benign"])}, list),
        ({"study": "second"}, reordered),
        ({"study": "second"}, lambda rows: [*rows, rows[0] | {"text": "a new finding"}]),
        ({"study": "second"}, lambda rows: rows[1:]),
        ({"study": "second"}, lambda rows: [row | {"label": "benign"} for row in rows]),
        ({"study": "second"}, lambda rows: [row | {"age": 7, "subject": "x"} for row in rows]),
        ({"study": "second"}, lambda rows: [row | {"text": f" {row['text']}\t"} for row in rows]),
    ],
)
def test_after_the_budget_is_spent_no_study_and_no_edit_of_the_file_brings_it_back(
    spent, changes, edit, caplog
):
    caplog.set_level(logging.WARNING)
    path = write(spent / "again.jsonl", edit(ROWS))
    silo = session(a_study(**changes), path, spent)
    assert isinstance(reply_to(silo, begin(ROUNDS - 1)), Refused)  # the least that it could ask
    assert silo.training.workload.trained == []
    assert re.search(r"[0-9.]+ is left", caplog.text), caplog.text


def test_other_records_are_free_to_be_used(spent):
    path = write(
        spent / "other.jsonl", [row | {"text": f"another {i}"} for i, row in enumerate(ROWS)]
    )
    assert isinstance(reply_to(session(a_study("second"), path, spent), begin()), Trained)


def test_the_same_records_in_another_format_are_the_same(spent, caplog):
    caplog.set_level(logging.WARNING)
    lines = [f"{row['patient']},{row['label']},{row['text']}" for row in ROWS]
    path = spent / "records.csv"
    path.write_text("\n".join(["patient,label,text", *lines]) + "\n")
    assert isinstance(reply_to(session(a_study("second"), path, spent), begin()), Refused)
    assert "is left" in caplog.text


# --- consent ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    rows = (directory / "train.jsonl").read_text().splitlines()
    (directory / "mine.jsonl").write_text("\n".join(rows[:60]))
    (directory / "less.jsonl").write_text("\n".join(rows[:20]))
    return directory


@pytest.fixture
def member(inputs, tmp_path):
    homes = make_identities(tmp_path, ["silo-1", "silo-2", "silo-3", "silo-4"])
    path = write_signed(load_study(inputs / "tiny.yaml"), homes, tmp_path / "study.yaml")
    with roles.take_part(load_study(path), path, homes["silo-1"], "silo", str) as entered:
        yield entered


def workload(member, inputs, questions=None):
    if questions is None:
        return roles.silo_workload(member.study, "silo-1", inputs / "mine.jsonl", inputs, silent)
    return roles.workload_of(member.study, "silo-1", questions, inputs, silent)


RUN = "5c" * 32


def spend(member, inputs, events, epsilon=8.0):
    """An earlier study on a third of the file."""
    some = read_records(member.study, inputs / "less.jsonl")
    with Ledger(member.home / roles.LEDGER, member.name) as ledger:
        records = ledger.identify(contents_of(some))
        ledger.reserve("less", "record", "r", 0, 0, events, (epsilon, 1e-5), records=records)


@pytest.mark.soak
def test_the_terms_are_those_of_the_record_that_has_spent_most(member, inputs):
    mine = workload(member, inputs)
    fresh = consent.terms(member, mine, None)
    assert (fresh.spent, fresh.median, fresh.untouched, fresh.budget) == (0.0, 0.0, 60, 8.0)
    assert 7.0 < fresh.after <= 8.0
    consent.require_budget(member, mine, None)
    spend(member, inputs, [PoissonGaussian(0.1, 1.0, 30)])
    terms = consent.terms(member, mine, None)
    assert 2.0 < terms.spent < 8.0
    assert terms.after > 8.0
    assert (terms.median, terms.untouched, terms.left_out) == (0.0, 40, 0)
    assert terms.spent < terms.after
    with pytest.raises(BudgetExceeded, match=r"20 of 60 records cannot pay: .* is left") as caught:
        consent.require_budget(member, mine, None)
    assert "--records skip: the other 40 records can pay" in caught.value.hint


def reading(kind, **columns):
    return {"kind": kind, "labels": ["benign"], "columns": columns}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (reading("classification", text="note"), reading("classification", text="summary")),
        (reading("image_classification", image="a"), reading("image_classification", image="b")),
        (reading("image_classification", image="a"), reading("classification", text="note")),
        (reading("classification", text="note"), reading("image_classification", image="b")),
        (reading("audio_classification", audio="c"), reading("audio_classification", audio="d")),
        (reading("image_classification", image="a"), reading("audio_classification", audio="c")),
        (reading("audio_classification", audio="d"), reading("classification", text="note")),
        (reading("classification", text="note"), reading("audio_classification", audio="c")),
    ],
    ids=[
        "words",
        "pictures",
        "from pictures to words",
        "from words to pictures",
        "recordings",
        "from pictures to recordings",
        "from recordings to words",
        "from words to recordings",
    ],
)
def test_a_study_that_reads_rows_otherwise_finds_the_budget_spent(first, then, tmp_path):
    """Adversary: the author of the next study, who has the same rows read by another column, or by
    a study of another kind."""
    rows = [
        {
            "a": [[i, 1], [2, 3]],
            "b": [[i, 9], [8, 7]],
            "c": [i, 1] * 800,
            "d": [i, 2] * 800,
            "note": f"note {i}",
            "summary": f"summary {i}",
            "label": "benign",
        }
        for i in range(60)
    ]
    if "text" not in {**first["columns"], **then["columns"]}:
        rows = [{name: row[name] for name in ("a", "b", "c", "d", "label")} for row in rows]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"first": read_questions(file, **first), "then": read_questions(file, **then)}

    def spend(ledger, study, records):
        known = ledger.identify(records)
        noise = calibrate(8.0, 1e-5, 0.1, 60)
        dataset, events = dataset_fingerprint(found[study]), [PoissonGaussian(0.1, noise, 60)]
        ledger.foresee(dataset, "record", events, 1, (8.0, 1e-5), records=known, study=study)
        given = (dataset, "record", study, 0, 0, events, (8.0, 1e-5))
        ledger.release(ledger.reserve(*given, records=known, study=study))

    for rowless in (True, False):  # first the control: words are all that a record is known by
        with Ledger(tmp_path / f"{rowless}.sqlite", "silo-1") as ledger:
            records = {name: list(contents_of(found[name])) for name in found}
            if rowless:
                records = {name: [c._replace(row=b"") for c in records[name]] for name in records}
            spend(ledger, "first", records["first"])
            if rowless:
                spend(ledger, "then", records["then"])
                continue
            with pytest.raises(BudgetExceeded, match="of 8 is spent"):
                spend(ledger, "then", records["then"])


def test_skip_leaves_out_what_cannot_pay_and_the_study_is_about_the_rest(member, inputs):
    spend(member, inputs, [PoissonGaussian(0.1, 1.0, 30)])
    every = workload(member, inputs)
    left = consent.without_spent(member, every, None, lambda q: workload(member, inputs, q))
    assert isinstance(left, SiloTuning)
    assert left.records == 40
    (event,) = left.events()
    assert event.q == 8 / 40 > every.events()[0].q
    assert event.noise_multiplier > every.events()[0].noise_multiplier
    consent.require_budget(member, left, None)
    terms = consent.terms(member, left, None, left_out=20)
    assert (terms.records, terms.left_out, terms.spent, terms.untouched) == (40, 20, 0.0, 40)
    assert terms.after <= 8.0
    # Begun: a restart finds the same records, although by now they could not pay for it again.
    with Ledger(member.home / roles.LEDGER, member.name) as ledger:
        records = consent.identified(ledger, member.study, left)
        about = {"records": records, "study": digest(member.study).hex()}
        ledger.reserve(left.dataset, "record", RUN, 0, 0, left.events(), (8.0, 1e-5), **about)
    again = consent.without_spent(member, every, None, lambda q: workload(member, inputs, q))
    assert again.questions == left.questions
    consent.require_budget(member, again, None)


BY_SUBJECT = PRIVACY | {"unit": "subject", "subject": "patient"}


def without_spent(member, path):
    """What ``client --records skip`` takes part with, here without a model."""
    study = member.study
    whole = FileSilo(study, path)
    return consent.without_spent(member, whole, None, lambda kept: FileSilo(study, path, kept))


@pytest.fixture
def skipping(tmp_path, monkeypatch):
    """A silo whose first rows are spent, and the file that it begins a study with."""
    monkeypatch.setattr("securefedcollm.federation.cotuning.planned_event", planned)

    def begin_with(rows, spent_rows, column, privacy):
        path = write(tmp_path / "mine.jsonl", rows)
        kind = {"kind": "classification", "labels": ["benign", "malign"]}
        earlier = write(tmp_path / "earlier.jsonl", spent_rows)
        found = read_questions(earlier, columns={"text": column}, **kind)
        study = a_study("second", privacy=privacy)
        ledger = tmp_path / roles.LEDGER
        member = SimpleNamespace(study=study, name="silo-1", ledger=ledger, run=tmp_path)
        with Ledger(tmp_path / roles.LEDGER, "silo-1") as ledger:
            about = {"records": ledger.identify(contents_of(found)), "study": "earlier"}
            noise = calibrate(8.0, 1e-5, RATE, 60)
            event = PoissonGaussian(RATE, noise, 60)
            ledger.reserve("e", "record", "earlier", 0, 0, [event], (8.0, 1e-5), **about)
        left = without_spent(member, path)
        with Ledger(tmp_path / roles.LEDGER, "silo-1") as ledger:
            about = {"records": consent.identified(ledger, study, left)}
            about["study"] = digest(study).hex()
            given = (left.dataset, privacy.get("unit", "record"), RUN, 0, 0, left.events())
            ledger.reserve(*given, (8.0, 1e-5), **about)
        return member, path, left

    return begin_with


def planned(study, questions):
    return PoissonGaussian(RATE, calibrate(8.0, 1e-5, RATE, STEPS * ROUNDS), STEPS)


def letters(count=40):
    label = ["benign", "malign"]
    return [
        {"text": f"finding {i}", "letter": f"letter {i}", "label": label[i % 2], "patient": f"p{i}"}
        for i in range(count)
    ]


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("privacy", [PRIVACY, BY_SUBJECT])
def test_a_restart_takes_the_records_that_it_began_with_not_others_of_the_same_words(
    skipping, equal, privacy
):
    """One of two reports with the same words was spent, by another column of its row, or for
    another subject. ``equal`` False is the control."""
    rows = letters()
    if equal:
        rows[0]["text"] = rows[20]["text"] = "no abnormality detected"
    if privacy is BY_SUBJECT:  # the report that both have is the spent subject's second
        rows[1]["patient"] = "p0"
        spent_rows, column, left = rows[1:2], "text", 38
    else:
        spent_rows, column, left = rows[:1], "letter", 39
    member, path, began = skipping(rows, spent_rows, column, privacy)
    assert began.records == left
    again = without_spent(member, path)
    assert (again.questions, again.dataset) == (began.questions, began.dataset)
    consent.require_budget(member, again, None)


def test_a_restart_without_all_the_records_that_it_began_with_is_refused(skipping):
    rows = letters()
    member, path, _ = skipping(rows, rows[:1], "letter", PRIVACY)
    write(path, rows[:-1])
    with pytest.raises(ConfigError, match="it had 39 different ones, of which 38 are in") as caught:
        without_spent(member, path)
    assert "put the file back" in caught.value.hint


def test_a_study_that_has_begun_and_cannot_go_on_is_refused_before_anybody_waits(member, inputs):
    """Another study spent the rest meanwhile. The newest sum may still be asked for again, at no
    cost: only once this silo saw it opened is there nothing left to wait for."""
    mine = workload(member, inputs)
    with Ledger(member.home / roles.LEDGER, member.name) as ledger:
        records = consent.identified(ledger, member.study, mine)
        about = {"records": records, "study": digest(member.study).hex()}
        ledger.reserve(mine.dataset, "record", RUN, 0, 0, mine.events(), (8.0, 1e-5), **about)
    consent.require_budget(member, mine, None)  # the control: it can pay
    with Ledger(member.home / roles.LEDGER, member.name) as ledger:
        ledger.reserve("x", "record", "r", 0, 0, mine.events(), (8.0, 1e-5), records=records)
    consent.require_budget(member, mine, None)
    store = SiloStore(member.run / "silos" / member.name)
    SumMemory(store, bytes.fromhex(RUN), 0).opened(0, 3)
    store.close()
    with pytest.raises(BudgetExceeded, match="is left"):
        consent.require_budget(member, mine, None)


def test_skip_with_nothing_left_says_so(member, inputs):
    spend(member, inputs, [PoissonGaussian(0.1, 1.0, 30)])
    mine = read_records(member.study, inputs / "mine.jsonl")
    four_left, none_left = (workload(member, inputs, mine[:n]) for n in (24, 20))

    def skip(whole):
        consent.without_spent(member, whole, None, lambda q: workload(member, inputs, q))

    with pytest.raises(ConfigError, match="an expected batch of 8 needs as many records, there"):
        skip(four_left)
    with pytest.raises(BudgetExceeded, match=r"none of 20 records can pay .* left"):
        skip(none_left)


def test_what_an_old_ledger_charged_is_known_from_the_first_sight_of_its_file(member, inputs):
    """Also for those records of it that are left out, in whatever file they come back."""
    mine = workload(member, inputs)
    with Ledger(member.home / roles.LEDGER, member.name) as ledger:
        ledger.reserve(
            mine.dataset, "record", "old", 0, 0, [PoissonGaussian(0.1, 1.0, 20)], (8.0, 1e-5)
        )
        ledger.reserve("gone", "record", "older", 0, 0, [PoissonGaussian(0.1, 9.0, 1)], (8.0, 1e-5))
    terms = consent.terms(member, mine, None)
    assert terms.spent > 2.0
    assert (terms.untouched, terms.unattributed) == (0, 1)
    part = workload(member, inputs, mine.questions[:30])
    assert consent.terms(member, part, None).spent == terms.spent
    with Ledger(member.home / roles.LEDGER, member.name) as ledger:
        assert [row.body["action"] for row in ledger.rows()] == ["reserve", "reserve", "file"]
        ledger.verify()


def test_spent_records_are_not_given_to_a_study_without_privacy(inputs, tmp_path):
    """Their budget is pinned by the first charge; the flag says that the operator knows."""
    ledger = tmp_path / roles.LEDGER
    member = SimpleNamespace(study=a_study(privacy=None), name="silo-1", ledger=ledger)
    consent.require_protection(member, False)  # the controls: nothing was charged, or it is private
    with Ledger(tmp_path / roles.LEDGER, "silo-1") as ledger:
        ledger.reserve("d", "record", "r", 0, 0, [PoissonGaussian(0.1, 1.0, 9)], (8.0, 1e-5))
    with pytest.raises(ConfigError, match=r"pinned at ε = 8, δ = 1e-05, and this study has no"):
        consent.require_protection(member, False)
    consent.require_protection(member, True)
    consent.require_protection(SimpleNamespace(**vars(member) | {"study": a_study()}), False)


@pytest.fixture
def charged(inputs, tmp_path):
    """A silo's home after one study: (member, home, how to enter it again, copy of its ledger)."""
    homes = make_identities(tmp_path, ["silo-1", "silo-2", "silo-3", "silo-4"])
    study = load_study(inputs / "tiny.yaml")
    first = write_signed(study, homes, tmp_path / "study.yaml")
    home = homes["silo-1"]

    def enter(name="study.yaml"):
        path = tmp_path / name
        return roles.take_part(load_study(path), path, home, "silo", str)

    with enter(first.name) as member:
        place = make_directory(member.run / "silos" / member.name)
        log = EvidenceLog(
            place / "evidence.sqlite", study=digest(member.study), owner="silo-1", key=member.key
        )
        copies = []
        with LoggedLedger(home / roles.LEDGER, "silo-1", log, sums=2) as ledger:
            for round_ in range(2):
                copies.append((home / roles.LEDGER).read_bytes())
                about = ("d", "record", RUN, round_, 0, [PoissonGaussian(0.1, 2.0, 9)], (8.0, 1e-5))
                records = ledger.identify([(bytes([i]) * 32, None) for i in range(9)])
                ledger.release(ledger.reserve(*about, records=records, study="s"))
        log.close()
    write_signed(load_study(inputs / "tiny.yaml", ["seed=7"]), homes, tmp_path / "second.yaml")
    return home, enter, copies[1]


def test_a_ledger_older_than_the_silos_own_evidence_is_refused_by_every_study(charged):
    """Adversary: an operator, or a backup, that puts the ledger back to before the last round."""
    home, enter, older = charged
    newest = (home / roles.LEDGER).read_bytes()
    for name in ("study.yaml", "second.yaml"):
        with enter(name):  # the control
            pass
    (home / roles.LEDGER).write_bytes(older)
    for name in ("study.yaml", "second.yaml"):
        with (
            pytest.raises(StateError, match=r"is older than .*evidence\.sqlite") as caught,
            enter(name),
        ):
            pass
        assert str(home / roles.LEDGER) in caught.value.message
        assert "restore the newest copy of the ledger" in caught.value.hint
    (home / roles.LEDGER).unlink()
    with pytest.raises(StateError, match="is gone, and the key of its records"), enter():
        pass
    (home / roles.LEDGER).with_suffix(".key").unlink()
    with pytest.raises(StateError, match="is older than"), enter("second.yaml"):
        pass
    (home / roles.LEDGER).write_bytes(newest)
    with enter():
        pass


def test_an_evidence_log_that_cannot_be_read_is_named(charged):
    home, enter, _ = charged
    (log,) = home.glob("studies/*/silos/*/evidence.sqlite")
    log.write_bytes(b"no database at all" * 99)
    with (
        pytest.raises(StateError, match=r"evidence\.sqlite: the evidence log cannot be read"),
        enter(),
    ):
        pass


def test_an_operators_limit_below_the_study_is_told_before_anything_is_sent(member, inputs):
    mine = workload(member, inputs)
    with pytest.raises(BudgetExceeded, match=r"the study asks for ε = 8; .* pinned at ε = 3"):
        consent.require_budget(member, mine, Budget(3.0, 1e-5))
    assert consent.terms(member, mine, Budget(3.0, 1e-5)).budget == 3.0
