"""Several attempts at one round: the same sum may be opened again, another never."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.protocol.cohort import Cohort, play

from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import ProtocolError


def attempt(cohort: Cohort, number: int, vectors=None, lost=(), at=Step.UPLOAD):
    """Play one attempt in which ``lost`` stop replying at ``at``; returns the sum."""
    header = msgspec.structs.replace(cohort.header, attempt=number)
    if vectors is not None:
        cohort.vectors.update(vectors)
    sides = {
        name: cohort.silo(name, header=header, incarnation=str(number)) for name in cohort.names
    }
    coordinator = CoordinatorRound(header=header, roster=cohort.roster)

    def reply(step, name, frame):
        return None if step is at and name in lost else frame

    return play(sides, coordinator, reply=reply)


def test_a_crashed_server_may_open_the_same_sum_again():
    cohort = Cohort()
    first = attempt(cohort, 0)
    again = attempt(cohort, 1)
    np.testing.assert_array_equal(first.sum, again.sum)
    assert first.survivors == again.survivors


def test_never_over_other_survivors():
    """Adversary: a server that calls its first attempt lost; the difference would be one vector."""
    cohort = Cohort()
    attempt(cohort, 0)
    with pytest.raises(ProtocolError, match="silos completed step unmask"):
        attempt(cohort, 1, lost=cohort.names[:1])


def test_an_attempt_that_was_not_opened_leaves_the_choice_of_survivors_free():
    cohort = Cohort()
    with pytest.raises(ProtocolError):
        attempt(cohort, 0, lost=cohort.names, at=Step.AGREE)
    result = attempt(cohort, 1, lost=cohort.names[:1])
    assert result.survivors == cohort.names[1:]
    np.testing.assert_array_equal(result.sum, cohort.plain_sum(cohort.names[1:]))


def test_a_silo_uploads_one_vector_in_a_round():
    """Adversary: as above, with a silo that trained a second time."""
    cohort = Cohort()
    first, other = cohort.names[0], cohort.vectors[cohort.names[0]] * 0 + 1
    attempt(cohort, 0)
    with pytest.raises(ProtocolError):  # its peers opened the sum with it, and keep to that
        attempt(cohort, 1, vectors={first: other})
