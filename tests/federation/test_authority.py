"""The round loops under an authority's key: same sums, dropouts without repeats, crashes, one sum.

Adversary: the server and ``silos.colluders`` silos; the authority does not collude with them.
"""

from __future__ import annotations

import math
import weakref
from functools import partial

import msgspec
import numpy as np
import pytest

from securefedcollm.aggregation import Roster
from securefedcollm.aggregation.ckks.parameters import MOST_OPENINGS
from securefedcollm.aggregation.header import MOST_ATTEMPTS
from securefedcollm.aggregation.messages import Ask
from securefedcollm.errors import ConfigError, ProtocolError
from securefedcollm.federation.authority import KEY_LIFETIME, AuthoritySession
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    Ended,
    EndRun,
    MakeKey,
    Ready,
    Refused,
    decode_reply,
    decode_request,
    encode,
)
from securefedcollm.federation.plan import AUTHORITY, authority_of
from securefedcollm.federation.silostore import SiloStore
from tests.support import joint
from tests.support.arithmetic import (
    AUTHORITY_KEY,
    KEYS,
    NAMES,
    ROSTER,
    SIZE,
    authority_record,
    make_silo,
    make_study,
)
from tests.support.client_level import CLIP, charged
from tests.support.client_level import PRIVACY as SILO_PRIVACY
from tests.support.rounds import CHARGED_ONCE, Cut, Dies, Killed, Run, expected_theta, spent

TRAIN, KEY, ENCRYPT, UPLOAD, OPENING, NOTE, EXCHANGES = range(7)
PLAN = {"clip_norm": CLIP, "scheme": "ckks", "key_model": "authority"}


def study(**changes):
    return make_study(aggregation=PLAN | changes.pop("aggregation", {}), **changes)


def test_the_mean_is_that_of_plain_arithmetic_bit_for_bit(tmp_path):
    made = study()
    run = Run(tmp_path, made, workers=2)
    np.testing.assert_array_equal(run.go(), expected_theta(made))
    assert spent(tmp_path, made) == dict.fromkeys(NAMES, CHARGED_ONCE)
    assert run.store.state.history[0]["bytes_up"][AUTHORITY] > 30_000  # keys and shares


def test_compact_differs_by_the_error_that_was_stated(tmp_path):
    made = study(aggregation={"ckks": "compact"}, rounds=1)
    error = Run(tmp_path, made).go() - expected_theta(made)
    unit = CLIP / made.field.bound / 8  # the mean of four, halved by the server
    # Rounding a Gaussian that is narrower than the rounding: its tails beyond k ± 1/2.
    tails = [1 - math.erf((k - 0.5) / made.ring.rms / math.sqrt(2)) for k in range(1, 6)]
    expected = math.sqrt(sum((2 * k - 1) * tail for k, tail in enumerate(tails, start=1)))
    assert 0.1 < expected < 1
    # About five of a hundred values are wrong by one; fifteen would be once in ten thousand runs.
    assert error.std() / unit < 1.8 * expected
    assert np.abs(error).max() <= (made.ring.greatest_error + 0.5) * unit * (1 + 1e-5)


@pytest.mark.parametrize("at", [TRAIN, ENCRYPT, UPLOAD, OPENING])
def test_a_silo_that_drops_out_is_left_out_and_nobody_repeats(tmp_path, at):
    """Lost from an exchange on: until its upload it is not in the sum, afterwards it is."""
    made = study(rounds=1)
    begun = []

    class Count(Cut):
        def exchange(self, frames, timeout):
            begun.extend(isinstance(decode_request(f), MakeKey) for f in frames.values())
            return super().exchange(frames, timeout)

    run = Run(tmp_path, made, wrap=lambda e: Count(e, ("silo-2",), at))
    theta = run.go()
    rest = NAMES if at > UPLOAD else tuple(n for n in NAMES if n != "silo-2")
    np.testing.assert_array_equal(theta, expected_theta(made, rest))
    assert run.store.state.history[0]["survivors"] == list(rest)
    assert sum(begun) == 1  # one attempt, under one key


def test_below_the_quorum_nothing_is_opened_and_the_run_can_be_resumed(tmp_path):
    made = study(rounds=1)
    run = Run(tmp_path, made, wrap=lambda e: Cut(e, ("silo-2", "silo-3"), UPLOAD))
    with pytest.raises(ProtocolError, match="only 2 silos completed step upload; 3 are needed"):
        run.go()
    np.testing.assert_array_equal(Run(tmp_path, made, resume=True).go(), expected_theta(made))


@pytest.mark.parametrize("at", [TRAIN, KEY, OPENING])
def test_without_its_authority_a_run_stops_and_goes_on_when_it_is_back(tmp_path, at):
    made = study(rounds=1)
    with pytest.raises(ProtocolError, match="authority"):
        Run(tmp_path, made, wrap=lambda e: Cut(e, (AUTHORITY,), at)).go()
    run = Run(tmp_path, made, resume=True)
    np.testing.assert_array_equal(run.go(), expected_theta(made))
    assert "lost" not in run.store.state.history[0]
    assert spent(tmp_path, made) == dict.fromkeys(NAMES, CHARGED_ONCE[:1])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", range(EXCHANGES + 1))
def test_killed_at_any_exchange_the_run_resumes_to_the_same_end(tmp_path, at, before):
    made = study(rounds=2)
    with pytest.raises(Killed):
        Run(tmp_path, made, wrap=lambda e: Dies(e, at, before)).go()
    theta = Run(tmp_path, made, resume=True).go()
    np.testing.assert_array_equal(theta, expected_theta(made))
    assert spent(tmp_path, made) == dict.fromkeys(NAMES, CHARGED_ONCE[:2])


def test_what_was_opened_with_a_silo_is_not_opened_again_without_it(tmp_path):
    """All four were opened, then the server died and silo-4 never came back: a sum of the other
    three would reveal silo-4's update. The round's updates are lost; the run goes on."""
    made = study(rounds=2)
    with pytest.raises(Killed):
        Run(tmp_path, made, wrap=lambda e: Dies(e, OPENING, before=False)).go()
    run = Run(tmp_path, made, resume=True, wrap=lambda e: Cut(e, ("silo-4",), TRAIN))
    run.go()
    first, second = run.store.state.history
    assert "lost" in first
    assert first["survivors"] == []
    assert second["survivors"] == ["silo-1", "silo-2", "silo-3"]


@pytest.mark.parametrize("key_model", ["authority", "threshold"])
def test_a_server_that_dies_in_every_opening_loses_the_round_and_goes_on(tmp_path, key_model):
    """The same sum is opened three times; the fourth time there is no answer, for an honest server
    as for another."""
    made = study(rounds=2, aggregation={"key_model": key_model})
    opening = {"authority": OPENING, "threshold": 6}[key_model]
    for life in range(MOST_OPENINGS):
        run = Run(tmp_path, made, resume=life > 0, wrap=lambda e: Dies(e, opening, before=False))
        with pytest.raises(Killed):
            run.go()
    run = Run(tmp_path, made, resume=True)
    run.go()
    first, second = run.store.state.history
    assert "a sum that was opened 3 times" in first["lost"]
    assert (first["survivors"], second["survivors"]) == ([], list(NAMES))
    assert spent(tmp_path, made) == dict.fromkeys(NAMES, CHARGED_ONCE[:2])


def test_client_level_noise_is_settled_on_the_authority_s_word(tmp_path):
    made = study(privacy=SILO_PRIVACY)
    Run(tmp_path, made, private=False).go()
    for name in NAMES:
        assert charged(tmp_path, name) == [(r, "settled", 4) for r in range(3)]


def test_who_never_hears_what_was_opened_is_charged_the_worst_case(tmp_path):
    """silo-2 is lost after its upload, which is in the sum; silo-3 before, which is not."""
    made = study(privacy=SILO_PRIVACY, rounds=1)
    Run(tmp_path / "a", made, private=False, wrap=lambda e: Cut(e, ("silo-2",), NOTE)).go()
    assert charged(tmp_path / "a") == [(0, "settled", 4)]
    assert charged(tmp_path / "a", "silo-2") == [(0, "released", 3)]
    Run(tmp_path / "b", made, private=False, wrap=lambda e: Cut(e, ("silo-3",), UPLOAD)).go()
    assert charged(tmp_path / "b") == [(0, "settled", 3)]
    assert charged(tmp_path / "b", "silo-3") == [(0, "released", 3)]


def test_joint_dp_sgd_sums_its_steps_under_an_authority_s_key(tmp_path):
    plan = {"value_bits": 20, "scheme": "ckks", "key_model": "authority"}
    made = joint.study(aggregation=plan)
    live = joint.run(tmp_path, made)
    joint.check_theta(made, live.go(), live.server)
    sums = [(i, 0, "settled", 4) for i in range(made.sums)]
    assert all(joint.charged(tmp_path, name) == sums for name in NAMES)


# The authority's session ------------------------------------------------------------------------


def ask(office, **changes):
    request = MakeKey(b"r" * 16, 0, 0, b"m" * 32, SIZE)
    return reply_of(office, msgspec.structs.replace(request, **changes))


def reply_of(office, request):
    return decode_reply(office.step(encode(request)), AUTHORITY)


def office_in(directory, made=None, **more):
    return make_silo(AUTHORITY, None, study=made or study(), directory=directory, **more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": 3}, "asked for round 4 of a study of 3"),
        ({"round": -1}, "asked for round 0"),
        ({"run_id": b"short"}, "a malformed request for a key"),
        ({"model": b"short"}, "a malformed request for a key"),
        ({"values": 0}, "the authority cannot take part"),
        ({"attempt": 2**32}, "the authority cannot take part"),
    ],
)
def test_the_authority_refuses_what_does_not_fit_its_own_study(tmp_path, change, message):
    """Adversary: the server."""
    office = office_in(tmp_path)
    refusal = ask(office, **change)
    assert isinstance(refusal, Refused)
    assert message in refusal.message
    assert isinstance(ask(office), Ready)


def test_the_authority_takes_part_in_one_run_and_no_past_round(tmp_path):
    """Adversary: a server that starts again, to have the same updates summed over fewer silos."""
    assert isinstance(ask(office_in(tmp_path)), Ready)
    again = office_in(tmp_path)  # restarted
    assert "a second run" in ask(again, run_id=b"s" * 16).message
    assert isinstance(ask(again, round=1), Ready)
    assert "past round 1" in ask(again, attempt=1).message
    assert isinstance(reply_of(again, EndRun(b"r" * 16)), Ended)
    assert "past round 2" in ask(again, round=1, attempt=1).message
    assert "takes no part in" in reply_of(again, EndRun(b"s" * 16)).message


def test_keys_for_one_round_are_made_so_often_and_no_more(tmp_path):
    """Adversary: a server that has the authority fill its disk, by one request over and over."""
    office = office_in(tmp_path)
    for _ in range(MOST_ATTEMPTS):
        assert isinstance(ask(office), Ready)
    again = office_in(tmp_path)  # restarted
    assert "more than 64 attempts at round 1" in ask(again).message
    assert isinstance(ask(again, round=1), Ready)


def test_the_authority_answers_only_for_its_own_role_and_in_order(tmp_path):
    office = office_in(tmp_path)
    assert "before an attempt began" in reply_of(office, Aggregate(b"x")).message
    assert isinstance(ask(office), Ready)
    assert isinstance(reply_of(office, Aggregate(b"x")), Refused)
    assert "before an attempt began" in reply_of(office, Aggregate(b"x")).message
    silo = make_silo("silo-1", None, study=study(), directory=tmp_path)
    assert "the authority's key" in ask(silo).message


def test_keys_are_dropped_after_an_hour_whatever_the_server_does(tmp_path):
    """Adversary: a server that never ends an attempt, and later gets at the authority's machine."""
    clock = [100.0]
    office = office_in(tmp_path, now=lambda: clock[0])

    def made(attempt):
        assert isinstance(ask(office, attempt=attempt), Ready)
        clock[0] += 24 * 3600.0  # while silos train there are no keys
        office.drop_overdue()
        header = office._side._header
        keys = reply_of(office, Aggregate(Ask(header).encode()))
        assert isinstance(keys, Aggregated)
        return weakref.ref(office._side._secrets)

    secrets = made(0)
    clock[0] += KEY_LIFETIME - 1
    office.drop_overdue()
    assert secrets() is not None
    clock[0] += 1
    office.drop_overdue()  # as the process does while it waits
    assert secrets() is None
    late = reply_of(office, Aggregate(b"x"))
    assert "after its keys were dropped" in late.message
    secrets = made(1)
    clock[0] += KEY_LIFETIME
    assert isinstance(reply_of(office, Aggregate(b"x")), Refused)  # as any frame does
    assert secrets() is None
    assert isinstance(ask(office, attempt=2), Ready)


def test_who_the_authority_is_follows_from_the_study(tmp_path):
    office = partial(
        AuthoritySession, store=SiloStore(tmp_path), evidence=authority_record(), roster=ROSTER
    )
    with pytest.raises(ConfigError, match="no party holds a decryption key"):
        office(study=make_study(), key=AUTHORITY_KEY)
    silos = [{"name": n, "role": "silo", "key": k.public.hex()} for n, k in KEYS.items()]
    listed = [
        *silos,
        {"name": "server", "role": "server", "key": "cd" * 32},
        {"name": "auditor", "role": "authority", "key": AUTHORITY_KEY.public.hex()},
    ]
    signed = study(roster=listed)
    assert authority_of(signed, b"x" * 32).key == AUTHORITY_KEY.public  # the roster's, whoever asks
    office(study=signed, key=AUTHORITY_KEY)
    with pytest.raises(ConfigError, match="authority is auditor, with another key"):
        office(study=signed, key=KEYS["silo-1"])
    fewer = Roster({name: KEYS[name].public for name in NAMES[:3]})
    with pytest.raises(ConfigError, match="not those of the signed study"):
        office(study=signed, roster=fewer, key=AUTHORITY_KEY)
    with pytest.raises(ConfigError, match="nobody is named as the authority"):
        authority_of(study())


class Without:
    """An engine that never heard of the authority."""

    def __init__(self, engine):
        self.engine = engine

    def exchange(self, frames, timeout):
        rest = {name: frame for name, frame in frames.items() if name != AUTHORITY}
        gone = {name: Failure("unknown") for name in frames if name == AUTHORITY}
        return self.engine.exchange(rest, timeout) | gone


def test_a_coordinator_without_an_authority_says_so(tmp_path):
    made = study(rounds=1)
    with pytest.raises(ProtocolError, match="the authority authority is not there: unknown"):
        Run(tmp_path, made, wrap=Without).go()
