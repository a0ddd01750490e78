"""A run keeps the kind of charge that its sums began with, and nobody gains by saying another."""

from __future__ import annotations

import json

import pytest

from securefedcollm.errors import BudgetExceeded, ConfigError, StateError
from securefedcollm.federation import consent, roles
from securefedcollm.federation import silo as silo_module
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.messages import BeginEarlier, BeginRound, Refused, Trained, encode
from securefedcollm.federation.plan import (
    counting,
    counting_named,
    joint_setting,
    joint_step,
    run_key,
    run_scope,
    silo_unit,
)
from securefedcollm.federation.silostore import SiloStore, SumMemory
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.events import SUMS, repeat
from securefedcollm.privacy.filters import Terms, filter_within
from securefedcollm.privacy.joint import JointStep
from securefedcollm.privacy.ledger import Ledger
from tests.support import client_level
from tests.support.arithmetic import NAMES, SIZE, ArithmeticSilo, make_silo, make_study
from tests.support.joint import study as joint_study
from tests.support.members import members_of
from tests.support.rounds import Dies, Killed, Run, reply_to
from tests.support.validated import VALIDATED, AskedSilo

OLD, NEW = "discrete-gaussian", "rounded-gaussian"


def begin(said, sum_=0):
    """The server's word for the kind, and the request that says it."""
    message = {OLD: BeginEarlier, NEW: BeginRound}[said]
    return encode(message(b"r" * 16, sum_, 0, b"l" * 32, bytes(4 * SIZE)))


def took_part(homes, study, run_id, names=NAMES):
    """The journals of silos that entered the run with earlier code, which noted no kind."""
    for name in names:
        (homes / name).mkdir(parents=True, exist_ok=True)
        store = SiloStore(homes / name)
        store.record(run_key(study), run_id)
        store.close()


def state_of(directory, change):
    path = directory / "server" / "state.json"
    state = json.loads(path.read_bytes())
    change(state)
    path.write_text(json.dumps(state))


def of_earlier_code(directory):
    """``state.json`` as it was before it named a kind, once silos have been asked."""

    def older(state):
        state.pop("sums")
        state["attempt"] = max(state["attempt"], 1)

    state_of(directory, older)


def charged(home):
    with Ledger(
        home / "ledger.sqlite", "silo-1" if home.name not in NAMES else home.name
    ) as ledger:
        return [event for entry in ledger.entries() for event in entry.reserved]


def charges(directory):
    return {name: charged(directory / "silos" / name) for name in NAMES}


def unit_of(study, kind):
    if study.joint:
        return joint_step(study, SIZE, kind)
    return silo_unit(study, lambda round_: SIZE, 0, kind=kind)


@pytest.mark.parametrize(
    "study", [joint_study(rate=0.5), client_level.study()], ids=["joint", "silo"]
)
@pytest.mark.parametrize("kind", [NEW, OLD])
def test_silos_that_were_not_charged_yet_take_the_kind_that_the_run_began_with(
    tmp_path, study, kind
):
    """They entered it with earlier code, and that was killed before it charged anything."""
    live = Run(tmp_path, study, private=False)
    assert live.store.state.sums == NEW
    if kind == OLD:
        of_earlier_code(tmp_path)
        took_part(tmp_path / "silos", study, live.store.run_id)
        live = Run(tmp_path, study, private=False, resume=True)
    live.go()
    assert charges(tmp_path) == dict.fromkeys(NAMES, [unit_of(study, kind).event()] * study.sums)
    assert unit_of(study, OLD).noise_multiplier > 1.02 * unit_of(study, NEW).noise_multiplier


@pytest.mark.parametrize("kind", [NEW, OLD])
def test_a_killed_run_goes_on_as_it_began(tmp_path, kind):
    study = joint_study()
    live = Run(tmp_path, study, private=False, wrap=lambda e: Dies(e, 8, False))
    live.store.state.sums = kind
    if kind == OLD:
        took_part(tmp_path / "silos", study, live.store.run_id)
    with pytest.raises(Killed):
        live.go()
    if kind == OLD:
        of_earlier_code(tmp_path)
    again = Run(tmp_path, study, private=False, resume=True)
    again.go()
    assert not any("lost" in record for record in again.store.state.history)
    every = {type(event) for events in charges(tmp_path).values() for event in events}
    assert every == {SUMS[kind]}


@pytest.mark.parametrize("sums", ["truncated-gaussian", ["rounded-gaussian"], None])
def test_a_state_of_another_kind_is_named_and_kept(tmp_path, sums):
    Run(tmp_path, joint_study(), private=False)
    state_of(tmp_path, lambda state: state.update(sums=sums))
    before = (tmp_path / "server" / "state.json").read_bytes()
    with pytest.raises(StateError, match="charged in a way that this version does not know"):
        Run(tmp_path, joint_study(), private=False, resume=True)
    assert (tmp_path / "server" / "state.json").read_bytes() == before


def test_counts_are_read_with_the_noise_that_they_were_made_with(tmp_path):
    study = make_study(**VALIDATED)
    live = Run(tmp_path, study, kind=AskedSilo)
    of_earlier_code(tmp_path)
    took_part(tmp_path / "silos", study, live.store.run_id)
    live = Run(tmp_path, study, kind=AskedSilo, resume=True)
    live.go()
    old, new = counting(study, OLD), counting(study, NEW)
    for record in live.store.state.history:
        found = record["private"]
        assert found["sigma"] == old.read(found["counts"], found["silos"]).sigma
        assert found["sigma"] > 1.02 * new.read(found["counts"], found["silos"]).sigma
    # An auditor knows the kind by the mechanism in the sum's header.
    for made in (old, new):
        assert counting_named(study, made.identity.hex()).share_sigma == made.share_sigma
    assert counting_named(study, None).share_sigma == new.share_sigma
    between = 0.5 * (old.noise_multiplier + new.noise_multiplier)
    given = VALIDATED["validation"] | {"noise_multiplier": between}
    today = make_study(**VALIDATED | {"validation": given})
    assert counting_named(today, "00" * 32).noise_multiplier == between
    with pytest.raises(ConfigError, match="costs more than the study's"):
        counting(today, OLD)


def test_a_silo_s_operator_is_asked_for_what_the_run_began_with(tmp_path):
    """When `client` starts again in the middle. By today's kind the rest would seem to cost more
    than is left, and the silo would stay away from a run that it can pay."""
    joint = {key: joint_study(rate=0.5).tree[key] for key in ("local", "privacy", "aggregation")}
    with members_of(tmp_path, **joint) as members:
        member, mine = members["silo-1"], ArithmeticSilo("silo-1", private=False)
        study, agreed = member.study, (8.0, 1e-5)
        mine.records = 10
        session = roles.silo_session(member, mine, progress=silent, threads=1)
        scope, store = run_scope(study, b"r" * 16), session.training.store
        store.record(run_key(study), b"r" * 16)
        for sum_ in range(study.sums - 1):
            assert isinstance(reply_to(session, begin(OLD, sum_)), Trained)
            SumMemory(store, scope, sum_).opened(0, study.quorum)
            consent.require_budget(member, mine, None)
        assert consent.terms(member, mine, None).after <= 8.0
        assert {type(event) for event in charged(member.home)} == {SUMS[OLD]}
        # The control: the last sum, foreseen as one of a run that begins now.
        with Ledger(member.ledger, "silo-1") as ledger:
            newest = ledger.entries()[-1]
            about = {"records": ledger.stored(newest.about.records), "study": newest.about.study}
            last = newest.key.dataset, newest.key.unit
            ledger.foresee(*last, [unit_of(study, OLD).event()], 1, agreed, "steps", **about)
            with pytest.raises(BudgetExceeded):
                ledger.foresee(*last, [unit_of(study, NEW).event()], 1, agreed, "steps", **about)


# --- adversary: a server that claims the other kind -----------------------------------------------


def asked(directory):
    study = joint_study(rate=0.5)
    return make_silo("silo-1", silent, study=study, directory=directory, private=False)


@pytest.fixture
def silo(tmp_path):
    return asked(tmp_path)


def test_a_server_cannot_change_its_word(silo, tmp_path, monkeypatch):
    """To ask for the noise of the one kind in a run that is charged as the other."""
    old, new = (joint_step(joint_study(rate=0.5), SIZE, kind).event() for kind in (OLD, NEW))
    assert isinstance(reply_to(silo, begin(NEW)), Trained)
    refused = reply_to(silo, begin(OLD, 1))
    assert isinstance(refused, Refused)
    assert "the noise of an earlier version" in refused.message
    assert charged(tmp_path / "silo-1") == [new]
    assert isinstance(reply_to(silo, begin(NEW, 1)), Trained)
    assert charged(tmp_path / "silo-1") == [new, new]
    # The control: without the rule the silo does as the server says.
    monkeypatch.setattr(ChargedTraining, "kind", lambda self, scope, said: said)
    assert isinstance(reply_to(silo, begin(OLD, 2)), Trained)
    assert charged(tmp_path / "silo-1") == [new, new, old]


def test_a_server_that_says_nothing_does_not_lower_the_noise_of_an_older_run(
    silo, tmp_path, monkeypatch
):
    """Neither a new server that lies nor an old one that knows no other word."""
    old, new = (joint_step(joint_study(rate=0.5), SIZE, kind).event() for kind in (OLD, NEW))
    silo.training.store.record(run_key(joint_study(rate=0.5)), b"r" * 16)
    assert isinstance(reply_to(silo, begin(OLD)), Trained)
    assert isinstance(reply_to(silo, begin(NEW, 1)), Trained)
    assert charged(tmp_path / "silo-1") == [old, old]
    monkeypatch.setattr(ChargedTraining, "kind", lambda self, scope, said: said)
    assert isinstance(reply_to(silo, begin(NEW, 2)), Trained)
    assert charged(tmp_path / "silo-1")[2] == new != old


def cost(event, study):
    """ε of all its sums, as a ledger that begins with it counts."""
    terms = Terms(event, study.privacy.epsilon)
    whole = repeat(event, study.sums)
    return filter_within([whole], study.privacy.delta, study.privacy.epsilon, terms)


def test_noise_that_is_too_little_for_its_charge_is_not_added(silo, tmp_path, monkeypatch):
    """Whatever led a silo to the noise of the one kind and the charge of the other: its ledger
    looks at both, before it trains."""
    study = joint_study(rate=0.5)
    z = joint_step(study, SIZE, NEW).noise_multiplier
    mixed = JointStep(joint_setting(study, SIZE, OLD), z, study.privacy.clip_norm)
    monkeypatch.setattr(silo_module, "joint_step", lambda *given: mixed)
    silo.training.store.record(run_key(study), b"r" * 16)
    assert isinstance(reply_to(silo, begin(OLD)), Refused)
    assert charged(tmp_path / "silo-1") == []
    # The controls: it would have cost too much; and either kind with its own noise is admitted.
    assert cost(mixed.event(), study) > study.privacy.epsilon
    for kind in (OLD, NEW):
        assert cost(joint_step(study, SIZE, kind).event(), study) <= study.privacy.epsilon
    monkeypatch.undo()
    for kind in (OLD, NEW):
        took_part(tmp_path / kind, study, b"r" * 16, NAMES[:1])
        assert isinstance(reply_to(asked(tmp_path / kind), begin(kind)), Trained)


def test_a_server_cannot_make_records_dearer_for_good(silo, tmp_path, monkeypatch):
    """Adversary: a server that says in a *new* run that earlier code began it. One step charged the
    older way, as the first on these records, and all later ones cost by the general filter."""
    study = joint_study(rate=0.5)
    old, new = (joint_step(study, SIZE, kind).event() for kind in (OLD, NEW))
    refused = reply_to(silo, begin(OLD))
    assert isinstance(refused, Refused)
    assert "the noise of an earlier version" in refused.message
    assert charged(tmp_path / "silo-1") == []
    assert isinstance(reply_to(silo, begin(NEW)), Trained)  # and the run is none the worse
    # The control: without the rule the first charge is of the older kind; what follows is dearer.
    monkeypatch.setattr(ChargedTraining, "kind", lambda self, scope, said: said)
    assert isinstance(reply_to(asked(tmp_path / "unguarded"), begin(OLD)), Trained)
    assert charged(tmp_path / "unguarded" / "silo-1") == [old]
    delta, more = study.privacy.delta, [repeat(new, study.sums)]
    dear = filter_within([old, *more], delta, 0.0, Terms(old, study.privacy.epsilon))
    usual = filter_within([new, *more], delta, 0.0, Terms(new, study.privacy.epsilon))
    assert dear > 1.1 * usual


def test_a_run_that_no_silo_has_heard_of_begins_now(tmp_path):
    live = Run(tmp_path, joint_study(), private=False)
    state_of(tmp_path, lambda state: state.pop("sums"))
    again = Run(tmp_path, joint_study(), private=False, resume=True)
    assert again.store.state.sums == NEW
    assert again.store.run_id == live.store.run_id
