"""Whole rounds in memory: the opened sum is the plain sum, bit for bit, or there is none."""

from __future__ import annotations

import contextlib
import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securefedcollm_audits.protocol.cohort import Cohort, Hook, Puppet, altered, play

from securefedcollm.aggregation import TRANSITIONS, Step, coordinator_side, silo_side
from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.aggregation.masking.graph.choice import Graph
from securefedcollm.errors import (
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    StateError,
)
from securefedcollm.primitives import SigningKey, sha256

STEPS = tuple(TRANSITIONS)


def both_sides(cohort: Cohort) -> tuple[dict, CoordinatorRound]:
    silos = {name: cohort.silo(name) for name in cohort.names}
    return silos, CoordinatorRound(header=cohort.header, roster=cohort.roster)


@given(
    silos=st.integers(3, 9),
    values=st.integers(1, 60),
    bits=st.sampled_from([16, 17, 21, 32, 64]),
    threads=st.integers(1, 2),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_the_sum_is_exact(
    silos: int, values: int, bits: int, threads: int, data: st.DataObject
) -> None:
    bound = min((2**bits - 1) // (2 * silos), 2**31 - 1)
    cohort = Cohort(silos=silos, values=values, bound=bound, field_bits=bits)
    parameters = cohort.header.parameters
    lost = data.draw(
        st.lists(st.sampled_from(cohort.names), max_size=silos - parameters.quorum, unique=True)
    )
    coordinator = coordinator_side(
        "masking", header=cohort.header, roster=cohort.roster, threads=threads
    )
    sides = {
        name: silo_side(
            "masking",
            header=cohort.header,
            roster=cohort.roster,
            name=name,
            signing_key=cohort.keys[name],
            vector=cohort.vectors[name],
            vector_id=sha256(cohort.vectors[name].tobytes()),
            journal=cohort.journals[name],
            threads=threads,
        )
        for name in cohort.names
    }
    step = data.draw(st.sampled_from(STEPS))
    result = play(sides, coordinator, reply=dropping(step, lost))
    expected = set(cohort.names)
    if step in (Step.ADVERTISE, Step.SHARE, Step.UPLOAD):
        expected -= set(lost)
    assert set(result.survivors) == expected
    assert set(result.dropouts) == (set(lost) if step is Step.UPLOAD else set())
    assert set(result.excluded) == set(lost)
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))
    assert "sum" not in repr(result)


def dropping(step: Step, lost: list[str]) -> Hook:
    return lambda now, name, frame: None if now is step and name in lost else frame


@pytest.mark.parametrize("when", ["request", "reply"])
@pytest.mark.parametrize("step", STEPS)
def test_down_to_the_threshold_a_round_completes_and_below_it_fails_cleanly(
    step: Step, when: str
) -> None:
    cohort = Cohort(silos=7)  # t = 5
    for lost, completes in ((2, True), (3, False)):
        cohort = Cohort(silos=7, label=f"{step} {when} {lost}")
        silos, coordinator = both_sides(cohort)
        hook = dropping(step, list(cohort.names[:lost]))
        spy = cohort.spy()
        if completes:
            result = play(silos, coordinator, spy=spy, **{when: hook})
            assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))
        else:
            with pytest.raises(ProtocolError, match=rf"only 4 silos completed step {step.value}"):
                play(silos, coordinator, spy=spy, **{when: hook})
            assert coordinator.step is Step.FAILED
            with pytest.raises(LocalProtocolError):
                _ = coordinator.result
            # Nothing is learnt, and the next round can start.
            assert not [one for one in spy.opened() if len(one.members) > 1]
            cohort.header = altered(cohort.header, round=4)
            again, coordinator = both_sides(cohort)
            assert play(again, coordinator).survivors == cohort.names


def test_silos_may_leave_at_every_step_of_one_round() -> None:
    cohort = Cohort(silos=15, colluders=1)  # t = 9
    silos, coordinator = both_sides(cohort)
    leaving = dict(zip(STEPS, cohort.names, strict=False))
    result = play(
        silos, coordinator, reply=lambda step, name, f: None if leaving[step] == name else f
    )
    assert result.dropouts == (leaving[Step.UPLOAD],)
    assert set(result.excluded) == set(leaving.values())
    assert leaving[Step.AGREE] in result.survivors
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))


@given(
    step=st.sampled_from(STEPS),
    at_request=st.booleans(),
    victims=st.integers(1, 3),
    kind=st.sampled_from(["drop", "truncate", "tamper", "duplicate", "delay", "swap", "garbage"]),
    position=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
)
@settings(max_examples=80, deadline=None)
def test_a_hostile_network_never_makes_a_wrong_sum(
    step: Step, at_request: bool, victims: int, kind: str, position: float, flip: int
) -> None:
    cohort = Cohort(silos=7)
    silos, coordinator = both_sides(cohort)
    spy = cohort.spy()
    earlier: dict[str, bytes] = {}
    held: list[bytes] = []

    def meddle(now: Step, name: str, frame: bytes) -> bytes | None:
        previous = earlier.get(name)
        earlier[name] = frame
        if now is not step or name not in cohort.names[:victims]:
            return frame
        at = int(position * len(frame))
        match kind:
            case "drop":
                return None
            case "truncate":
                return frame[:at]
            case "tamper":
                return frame[:at] + bytes([frame[at] ^ flip]) + frame[at + 1 :]
            case "duplicate" | "delay":  # the frame of the step before, instead of or once more
                return previous
            case "swap":
                held.append(frame)
                return held[0]
            case _:
                return bytes([flip]) * (1 + at)

    hooks = {"request": meddle} if at_request else {"reply": meddle}
    result = None
    with contextlib.suppress(ProtocolError):
        result = play(silos, coordinator, spy=spy, **hooks)
    if result is not None:
        assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))
    assert spy.leaks() == []


# The coordinator's interface --------------------------------------------------------------------


def test_a_second_or_late_frame_changes_nothing() -> None:
    cohort = Cohort(silos=6)
    silos, coordinator = both_sides(cohort)
    late: dict[str, bytes] = {}

    def reply(step: Step, name: str, frame: bytes) -> bytes | None:
        if step is Step.UPLOAD and name == cohort.names[0]:
            late[name] = frame
            return None
        return frame

    def request(step: Step, name: str, frame: bytes) -> bytes:
        if step is Step.AGREE:
            for silo, held in late.items():
                with pytest.raises(RemoteProtocolError, match="late"):
                    coordinator.receive(silo, held)
        return frame

    def twice(step: Step, name: str, frame: bytes) -> bytes | None:
        answer = reply(step, name, frame)
        if answer is not None and step is Step.UPLOAD:
            coordinator.receive(name, answer)
        return answer

    result = play(silos, coordinator, request=request, reply=twice)
    assert result.survivors == cohort.names[1:]
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))
    assert set(result.excluded) == {cohort.names[0]}


def test_a_silo_lost_after_its_reply_is_not_asked_again_but_its_reply_stands() -> None:
    cohort = Cohort(silos=11)  # t = 7
    silos, coordinator = both_sides(cohort)
    asked: dict[Step, list[str]] = {step: [] for step in STEPS}

    def request(step: Step, name: str, frame: bytes) -> bytes:
        asked[step].append(name)
        if name == cohort.names[-1]:  # the last silo asked: everyone else has replied
            coordinator.lost(cohort.names[STEPS.index(step)], "cable cut")
        return frame

    result = play(silos, coordinator, request=request)
    assert [len(asked[step]) for step in STEPS] == [11, 10, 9, 8, 7]
    assert cohort.names[0] not in result.survivors + result.dropouts
    assert cohort.names[1] not in result.survivors + result.dropouts
    assert cohort.names[2] in result.survivors
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))
    assert set(result.excluded.values()) == {"cable cut"}


def test_requests_are_for_those_who_have_not_replied() -> None:
    cohort = Cohort()
    silos, coordinator = both_sides(cohort)
    first = cohort.names[0]
    coordinator.receive(first, silos[first].handle(coordinator.requests()[first]))
    assert set(coordinator.requests()) == set(cohort.names[1:])
    assert coordinator.excluded == {}
    assert coordinator.step is Step.ADVERTISE
    assert "advertise" in repr(coordinator)


def test_closing_a_step_excludes_the_silent() -> None:
    cohort = Cohort()  # t = 4 of 5
    silos, coordinator = both_sides(cohort)
    for name, frame in list(coordinator.requests().items())[1:]:
        coordinator.receive(name, silos[name].handle(frame))
    assert coordinator.advance()
    assert coordinator.excluded == {cohort.names[0]: "no reply in step advertise"}
    assert set(coordinator.requests()) == set(cohort.names[1:])


def test_a_finished_coordinator_is_finished() -> None:
    cohort = Cohort()
    silos, coordinator = both_sides(cohort)
    frames: list[bytes] = []
    result = play(silos, coordinator, reply=lambda s, n, frame: frames.append(frame) or frame)
    assert coordinator.result is result
    for call in (
        coordinator.requests,
        coordinator.advance,
        lambda: coordinator.receive(cohort.names[0], frames[-1]),
    ):
        with pytest.raises(LocalProtocolError, match="over"):
            call()
    with pytest.raises(RemoteProtocolError, match="over"):
        silos[cohort.names[0]].handle(b"")


# The silo's interface ---------------------------------------------------------------------------


def test_a_silo_runs_with_its_own_identity() -> None:
    cohort = Cohort()
    cohort.keys[cohort.names[0]] = SigningKey(bytes(32))
    with pytest.raises(LocalProtocolError, match="identity"):
        cohort.silo(cohort.names[0])


def test_both_sides_refuse_a_header_that_names_other_algorithms() -> None:
    cohort = Cohort()
    cohort.header = altered(cohort.header, suite=Graph(3, 2).suite)
    with pytest.raises(LocalProtocolError, match="masking-graph-v1/3/2; this side is of"):
        cohort.silo(cohort.names[0])
    with pytest.raises(LocalProtocolError, match="this side is of"):
        CoordinatorRound(header=cohort.header, roster=cohort.roster)


def test_a_vector_id_has_32_bytes() -> None:
    cohort = Cohort()
    name = cohort.names[0]
    with pytest.raises(LocalProtocolError, match="vector id"):
        silo_side(
            "masking",
            header=cohort.header,
            roster=cohort.roster,
            name=name,
            signing_key=cohort.keys[name],
            vector=cohort.vectors[name],
            vector_id=b"",
            journal=cohort.journals[name],
        )


def test_failure_is_for_good_and_forgets_the_secrets() -> None:
    cohort = Cohort()
    silo = cohort.silo(cohort.names[0])
    with pytest.raises(RemoteProtocolError, match="well-formed"):
        silo.handle(b"nonsense")
    assert silo.step is Step.FAILED
    assert silo._secrets is None
    with pytest.raises(RemoteProtocolError, match="over"):
        silo.handle(
            coordinator_side("masking", header=cohort.header, roster=cohort.roster).requests()[
                cohort.names[0]
            ]
        )


def test_no_answer_leaves_if_the_journal_cannot_be_written() -> None:
    cohort = Cohort(silos=6)

    class Broken:
        def __init__(self, good: int) -> None:
            self.good = good

        def record(self, key: bytes, value: bytes) -> bytes:
            assert len(key) <= 40
            assert len(value) == 32
            self.good -= 1
            if self.good < 0:
                raise StateError("the disk is full", hint="make room")
            return value

    for good in range(6):
        cohort.journals = {name: Broken(good) for name in cohort.names}
        silos, coordinator = both_sides(cohort)
        with pytest.raises(StateError):
            play(silos, coordinator)
        assert silos[cohort.names[0]].step is Step.FAILED


def test_a_silo_is_neither_copied_nor_pickled_nor_printed() -> None:
    cohort = Cohort()
    silo = cohort.silo(cohort.names[0])
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="secrets"):
            use(silo)
    secret = cohort.randomness(cohort.names[0], cohort.header)(32)
    for shown in (repr(silo), repr(silo._secrets), repr(silo._secrets.buffer)):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


def test_secrets_are_gone_as_soon_as_they_are_not_needed() -> None:
    cohort = Cohort()
    puppet = Puppet(cohort)
    puppet.through_upload()
    silo = puppet.silos[cohort.names[0]]
    assert silo._secrets.mask_secret == silo._secrets.share_secret == silo._secrets.seed == b""
    assert len(silo._secrets.buffer.words) == 0
    names = cohort.names
    puppet.open(names, names, [], puppet.survey(names, names).values())
    assert silo._secrets is None
    assert silo.step is Step.DONE


def test_the_vector_is_taken_at_construction() -> None:
    cohort = Cohort()
    before = cohort.plain_sum(cohort.names)
    silos, coordinator = both_sides(cohort)
    for vector in cohort.vectors.values():
        vector[:] = 0
    assert np.array_equal(play(silos, coordinator).sum, before)
