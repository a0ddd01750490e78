"""Rounds whose frames are altered at random: own errors only, right sums only, nothing learnt.

``python -m securefedcollm_audits.fuzz`` runs the same target for as long as one likes.
"""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securefedcollm_audits.fuzz import targets as fuzz

REQUEST, REPLY = 0, 1  # the first two frames of a round


def alteration(frame: int, kind: int, where: int = 0, value: int = 0) -> bytes:
    return bytes([frame, kind]) + where.to_bytes(2, "little") + value.to_bytes(2, "little")


@settings(max_examples=40, deadline=None)
@given(script=st.binary(max_size=36))
def test_no_script_breaks_a_round(script):
    fuzz.one_round(script)


@pytest.mark.parametrize(
    ("script", "ended"),
    [
        (b"", "summed"),
        (alteration(REPLY, 0), "summed"),  # dropped: the other four go on
        (alteration(REQUEST, 2), "summed"),  # one silo is told nonsense and refuses
    ],
)
def test_what_a_script_does(script, ended):
    assert fuzz.one_round(script) == ended


def test_a_wrong_sum_is_a_finding(monkeypatch):
    monkeypatch.setattr(
        fuzz.Cohort, "plain_sum", lambda cohort, names: np.zeros(cohort.values, np.int64)
    )
    with pytest.raises(fuzz.BrokenError, match="not the sum"):
        fuzz.one_round(b"")


def test_a_leak_is_a_finding(monkeypatch):
    monkeypatch.setattr("securefedcollm_audits.protocol.spy.Spy.leaks", lambda spy: ["north"])
    with pytest.raises(fuzz.BrokenError, match="learnt"):
        fuzz.one_round(b"")


def test_the_program_replays_an_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz", "--input", ""])
    fuzz.main()
    assert capsys.readouterr().out == "summed\n"
