"""Every attack of the protocol audit fails, and the judge of the attacks can tell a leak."""

from __future__ import annotations

import numpy as np
import pytest
from securefedcollm_audits.protocol.cases import CASES, SERVER_CASES, Case, run
from securefedcollm_audits.protocol.cohort import Cohort, Puppet, play
from securefedcollm_audits.protocol.outcome import judge

from securefedcollm.aggregation.masking.coordinator import CoordinatorRound


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_attacker_learns_nothing(case: Case) -> None:
    outcome = case()
    assert outcome.learnt == ()
    assert outcome.held, outcome.defence
    assert outcome.defence


def test_run_names_the_cases() -> None:
    (name,) = run(SERVER_CASES[:1])
    assert name == SERVER_CASES[0].__name__


def test_the_spy_opens_what_the_protocol_opens() -> None:
    cohort = Cohort(silos=6)
    spy = cohort.spy()
    coordinator = CoordinatorRound(header=cohort.header, roster=cohort.roster)
    silos = {name: cohort.silo(name) for name in cohort.names}
    lost = cohort.names[0]
    result = play(
        silos,
        coordinator,
        spy=spy,
        reply=lambda step, name, frame: None if (step.value, name) == ("upload", lost) else frame,
    )
    sums = {opened.members: opened.total for opened in spy.opened()}
    honest = frozenset(range(2, 6))  # the colluder's own part it can take out by itself
    assert np.array_equal(sums[honest] + sums[frozenset({6})], result.sum)
    assert spy.leaks() == []


def test_the_spy_sees_a_leak_where_more_silos_collude_than_the_study_says() -> None:
    """Positive control: with t colluders the server opens each honest vector by itself."""
    cohort = Cohort(silos=6)  # t = 4, c = 1
    puppet = Puppet(cohort)
    for name in cohort.names[2:]:
        puppet.spy.collude(
            cohort.roster.index(name), cohort.header, cohort.randomness(name, cohort.header)
        )
    puppet.through_upload()
    assert len(puppet.spy.leaks()) == 3  # silo-001's vector, silo-002's, and two sums of one round
    alone = {opened.members: opened.total for opened in puppet.spy.opened()}
    assert np.array_equal(alone[frozenset({1})], cohort.vectors[cohort.names[0]])
    assert not judge("", puppet, cohort.names, "").held


def test_the_spy_sees_two_sums_where_silos_have_no_memory() -> None:
    """Positive control: without the journal, a second attempt gives the victim away."""
    cohort = Cohort(silos=6)
    names = cohort.names
    puppet = Puppet(cohort)
    puppet.through_upload()
    puppet.open(names, names, [], puppet.survey(names, names).values())
    cohort.journals = {name: type(cohort.journals[name])() for name in names}
    header = type(cohort.header)(
        **{
            field: getattr(cohort.header, field)
            for field in cohort.header.__struct_fields__
            if field != "attempt"
        },
        attempt=1,
    )
    cohort.betray(puppet.spy, header)
    again = Puppet(cohort, {name: cohort.silo(name, header=header) for name in names}, puppet.spy)
    deals = again.roll(names, again.ask(header=header).values())
    again.deliver(names, deals)
    rest = names[1:]
    again.open(rest, rest, names[:1], again.survey(rest, rest, names[:1]).values())
    assert any("sums in one round" in leak for leak in puppet.spy.leaks())
