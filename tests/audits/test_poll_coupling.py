"""``audit coupling --answers``: one record and what the others answer, pay and show."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from securefedcollm_audits.privacy import poll_coupling
from securefedcollm_audits.privacy.poll_coupling import (
    BestK,
    Case,
    audit,
    compare,
    faults_of,
    quick,
)
from securefedcollm_audits.protocol import poll_cohort
from securefedcollm_audits.protocol.poll_cohort import Held
from securefedcollm_audits.protocol.retrieval_cohort import embedding
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, LocalProtocolError
from securefedcollm.federation.questions.polls import Poll
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.retrieval.nearest import RecordIndex
from tests.support.polling import Voters
from tests.support.small import small_study

OTHERS = [Held("one", "amber"), Held("two", "violet"), Held("three", "amber")]
ALONE = Case("", OTHERS, Held("four", "amber"), ["four", "one", "two"])


@pytest.fixture(scope="module")
def study():
    return quick(poll_cohort.study_of())


def test_a_record_moves_nothing_but_the_sum(study):
    """Control: among the best k it does."""
    found = compare(study, ALONE, embedding)
    assert found[:2] == (0, 0)
    assert compare(study, ALONE, embedding, BestK).moved


def refusing(monkeypatch):
    """A silo of which no record answers refuses."""
    real = Ledger.reserve

    def reserve(ledger, *about, records=None, individually=False, **more):
        if individually and ledger.owner == "silo-1" and not len(records):
            raise LocalProtocolError("no record answers")
        return real(ledger, *about, records=records, individually=individually, **more)

    monkeypatch.setattr(Ledger, "reserve", reserve)


def test_a_refusal_for_a_records_sake_is_shown(study, monkeypatch):
    refusing(monkeypatch)
    assert compare(study, ALONE, embedding).shown


def test_a_record_that_joins_a_file_shows_in_no_head(study, monkeypatch):
    """Control: where a start writes nothing, the silo's own head says whether somebody new paid."""
    assert poll_coupling.joins(study, ALONE, embedding) == 0
    monkeypatch.setattr(poll_cohort, "begin_answering", lambda own, *_: own.head.digest)
    assert poll_coupling.joins(study, ALONE, embedding) == 2


def test_embeddings_that_follow_from_other_records_are_found(study):
    """As where a batch is padded to its longest."""

    def batched(vectors):
        rows = np.asarray(vectors)
        return RecordIndex(rows + 2 * rows[0])

    assert compare(study, ALONE, embedding, batched).moved


def test_the_time_is_that_of_the_most_work_that_an_asker_can_make(study, monkeypatch):
    """Every record is retrieved, charged and counted, for 64 choices as long as may be."""
    space, seen = SimpleNamespace(embed=lambda texts: np.array([embedding(t) for t in texts])), []
    real = poll_coupling.count_labels

    def counting(labels, fold):
        read = real(labels, fold)

        def watch(poll):
            def reading(retrieved, similarities):
                seen.append((len(poll.encode()), len(poll.choices), retrieved.sum()))
                return read(poll)(retrieved, similarities)

            return reading

        return watch

    monkeypatch.setattr(poll_coupling, "count_labels", counting)
    assert min(poll_coupling.slowest_reply(study, OTHERS, embedding, space)) > 0
    ((length, choices, retrieved),) = seen
    assert 0.7 * Poll.LIMIT < length <= Poll.LIMIT
    assert (choices, retrieved) == (64, len(OTHERS))


@pytest.mark.soak
def test_the_command_attacks_a_silos_own_records(tmp_path):
    local = {"steps": 1, "batch_size": 10, "learning_rate": 0.01, "reply_slot": 25.0}
    voters = Voters(tmp_path / "voters", {"local": local})
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(voters.study.tree))
    words = ["audit", "coupling", str(file), "--answers", "--data", str(voters.data), "--json"]
    result = CliRunner().invoke(app, [*words, "--records", "6", "--seed", "3"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["figures"]["answers of others that moved"] == 0
    assert said["figures"]["replies or evidence that differ"] == 0
    assert said["figures"]["control, best k: answers of others that moved"] > 0
    assert said["figures"]["records timed"] > said["figures"]["records"] == 6
    assert 0 < said["figures"]["slowest reply, s"] < said["figures"]["slot, s"] == 25.0


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ((1, 0, 1, 0.1), "answered, or paid, by other records"),
        ((0, 1, 1, 0.1), "in replies or evidence"),
        ((0, 0, 0, 0.1), "would notice nothing"),
        ((0, 0, 1, 1.2), "more than a slot"),
    ],
)
def test_each_fault_is_a_sentence(figures, told):
    (fault,) = faults_of(*figures)
    assert told in fault


def test_what_asks_no_records_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="asks no records"):
        audit(small_study(tmp_path))
