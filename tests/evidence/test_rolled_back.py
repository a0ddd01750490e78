"""A journal that is put back within an attempt: the evidence log beside it gives it away.

Adversary: a server that hears of the restored file, puts its own state back as well, and has a
second sum of the round opened without silo-3. The difference of both sums is silo-3's vector.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing, suppress
from functools import partial

import numpy as np
import pytest

from securefedcollm.errors import QuorumError
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.plan import AUTHORITY, quantiser
from securefedcollm.federation.records import authority as authority_records
from securefedcollm.federation.records import silo as silo_records
from tests.support.arithmetic import SIZE, update_of
from tests.support.runs import CKKS, RecordedRun, recorded_study

PLANS = {
    "masking": {"clip_norm": 20.0},
    "ckks": CKKS,
    "ckks-authority": CKKS | {"key_model": "authority"},
}
PUT_BACK = {
    "masking": ("silo-1", "silo-2"),
    "ckks": ("silo-1", "silo-2", "silo-4"),
    "ckks-authority": (AUTHORITY,),
}
"""Whose journal is put back. Masking: two answered for four silos, and silo-4 was not asked."""
OPENING = {"masking": 5, "ckks": 6, "ckks-authority": 4}
"""The exchange, from 0, in which shares leave."""


def journal_files(directory, names):
    homes = {AUTHORITY: directory / AUTHORITY}
    return [homes.get(name, directory / "silos" / name) / "silo.sqlite" for name in names]


def keep(files):
    """Copies of SQLite files that others have open."""
    copies = []
    for file in files:
        copies.append(sqlite3.connect(":memory:"))
        with closing(sqlite3.connect(file)) as source:
            source.backup(copies[-1])
    return copies


def put_back(copies, files):
    for copy, file in zip(copies, files, strict=True):
        with closing(sqlite3.connect(file)) as target:
            copy.backup(target)


def overtake(engine, names, copies, files):
    """Put the journals back while their owners answer, after they have looked at them."""
    for name in names:
        side = engine._local[name]._side
        side.handle = partial(
            lambda answer, frame: put_back(copies, files) or answer(frame), side.handle
        )


class Server:
    """An engine on the server's side, which acts before its k-th exchange.

    Args:
        acts: exchange → what to do before it.
        without: (silo, exchange) pairs: who does not hear of which.
    """

    def __init__(self, engine, acts, without):
        self.engine, self.acts, self.without, self.count = engine, acts, without, -1

    def exchange(self, frames, timeout):
        self.count += 1
        self.acts.get(self.count, lambda engine: None)(self.engine)
        gone = {n for n in frames if self.without(n, self.count)}
        here = {name: frame for name, frame in frames.items() if name not in gone}
        return self.engine.exchange(here, timeout) | dict.fromkeys(gone, Failure("cut off"))


def opened(directory, study, acts, without, resume=False):
    """The sums that the server has of round 1; it never tells anybody that the run is over."""
    sums = []
    run = RecordedRun(directory, study, resume=resume, wrap=lambda e: Server(e, acts, without))
    write = run.coordinator._evidence.summed

    def summed(header, result):
        sums.append((result.survivors, result.sum))
        write(header, result)

    run.coordinator._evidence.summed = summed
    with closing(run.engine), suppress(QuorumError):
        run.coordinator.run()
    return sums


def attack(directory, scheme, when):
    """The sum of four silos, and those that the second attempt opens, without silo-3.

    ``when``: the exchange of the second attempt before which the journals are put back.
    """
    study = recorded_study(rounds=1, privacy=None, aggregation=PLANS[scheme])
    files = journal_files(directory, PUT_BACK[scheme])
    copies, server = [], directory / "server"

    def after_the_beginning(engine):
        copies.extend(keep(files))
        shutil.copytree(server, directory / "kept")  # the server's own state, as it was then

    def unasked(silo, exchange):
        return scheme == "masking" and (silo, exchange) == ("silo-4", OPENING[scheme])

    ((names, first),) = opened(directory, study, {1: after_the_beginning}, unasked)
    assert names == ("silo-1", "silo-2", "silo-3", "silo-4")
    shutil.rmtree(server)
    shutil.copytree(directory / "kept", server)
    acts = {when: lambda engine: put_back(copies, files)}
    if when == "answering":
        acts = {OPENING[scheme]: lambda e: overtake(e, PUT_BACK[scheme], copies, files)}
    second = opened(directory, study, acts, lambda silo, _: silo == "silo-3", resume=True)
    return study, first, second


@pytest.mark.parametrize("when", [0, 1, "opening", "answering"])
@pytest.mark.parametrize("scheme", PLANS)
def test_who_opened_one_sum_opens_no_other_after_its_journal_was_put_back(
    tmp_path, caplog, scheme, when
):
    """Whenever it is put back: before the second attempt, in it, or while an answer is made."""
    when = OPENING[scheme] if when == "opening" else when
    assert attack(tmp_path, scheme, when)[2] == []
    assert "the journal of this run was lost or restored: its evidence log knows of" in caplog.text


@pytest.mark.parametrize("scheme", PLANS)
def test_without_the_look_at_the_evidence_the_difference_is_one_silo_s_vector(
    tmp_path, monkeypatch, scheme
):
    """The control: what the attack above is worth."""
    for module in (silo_records, authority_records):
        monkeypatch.setattr(module, "check_journal", lambda *_: None)
    study, first, ((names, second),) = attack(tmp_path, scheme, 0)
    assert names == ("silo-1", "silo-2", "silo-4")
    update = update_of("silo-3", 0, np.zeros(SIZE, dtype=np.float32))
    np.testing.assert_array_equal(first - second, quantiser(study, SIZE).encode(update).integers)
