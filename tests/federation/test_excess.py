"""Noise that a sum does not need is opened and subtracted, and never more than that."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from securefedcollm.aggregation.header import names_digest
from securefedcollm.errors import ConfigError, RemoteProtocolError
from securefedcollm.federation import silo as silo_module
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.excess import stated
from securefedcollm.federation.messages import (
    Layers,
    Refused,
    Surplus,
    Unmasked,
    decode_reply,
    decode_request,
    encode,
)
from securefedcollm.federation.plan import joint_step, run_scope, silo_unit
from securefedcollm.federation.runstore import RunStore
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.adversaries import seen_by
from securefedcollm.privacy.distributed import DistributedGaussian
from securefedcollm.privacy.dominance import dominates
from securefedcollm.privacy.events import (
    LayeredGaussian,
    RoundedGaussian,
    layer_sigmas,
)
from securefedcollm.privacy.noise import LayeredNoise
from tests.support.arithmetic import KEYS, NAMES, ROSTER, SIZE, make_study
from tests.support.joint import PRIVACY, charged, run, study
from tests.support.rounds import Dies, Killed

REMOVE = {"privacy": PRIVACY | {"excess_noise": "remove"}}


class Between:
    """Stands where the server stands: sees every exchange, and may change frames or lose silos."""

    def __init__(self, engine, change=lambda frames: frames, lost=lambda request: ()):
        self.engine, self.change, self.lost = engine, change, lost
        self.asked, self.replies = [], []

    def exchange(self, frames, timeout):
        requests = {name: decode_request(frame) for name, frame in frames.items()}
        kind = next(iter(requests.values()))
        gone = set(self.lost(kind)) & set(frames)
        alive = {name: frame for name, frame in self.change(frames).items() if name not in gone}
        replies = self.engine.exchange(alive, timeout) | {n: Failure("cut off") for n in gone}
        if isinstance(kind, Surplus):
            self.asked.append(requests)
            self.replies.append(
                {n: decode_reply(r, n) for n, r in replies.items() if isinstance(r, bytes)}
            )
        return replies


def between(**options):
    made = []

    def wrap(engine):
        made.append(Between(engine, **options))
        return made[-1]

    return wrap, made


@pytest.mark.parametrize(("least", "most", "colluders"), [(3, 4, 1), (6, 10, 1), (7, 12, 3)])
def test_what_is_left_is_exactly_what_is_promised(least, most, colluders):
    sigmas = layer_sigmas(100.0, least, most, colluders)
    assert len(sigmas) == most - least + 1
    for survivors in range(least, most + 1):
        left = math.fsum(sigma**2 for sigma in sigmas[: most - survivors + 1])
        honest = left * (survivors - colluders)
        assert honest >= 100.0**2 * (least - colluders)
        assert honest == pytest.approx(100.0**2 * (least - colluders), rel=1e-9)


def test_the_noise_of_a_sum_is_that_of_its_survivors():
    """Control: noise that is not removed."""
    made = DistributedGaussian(
        values=40_000,
        clip_norm=1.0,
        field_bound=2**40,
        noise_multiplier=2.0,
        least_survivors=3,
        colluders=1,
        silos=5,
    )
    zero = np.zeros(40_000, dtype=np.float32)
    noises = [LayeredNoise.fresh(len(made.layers)) for _ in range(5)]
    shares = [made.protect(zero, noise) for noise in noises]
    promised = 2.0 * made.quantiser.bound
    for survivors in (3, 4, 5):
        total = np.sum(shares[:survivors], axis=0)
        keys = [noise.opened(made.surplus(survivors)) for noise in noises[:survivors]]
        left = made.without_surplus(total, survivors, keys)
        honest = left.std() * math.sqrt((survivors - 1) / survivors)
        assert honest == pytest.approx(promised, rel=0.02)
        kept = total.std() * math.sqrt((survivors - 1) / survivors)
        assert kept == pytest.approx(promised * math.sqrt((survivors - 1) / 2), rel=0.02)
        assert np.abs(total).max() <= survivors * made.largest
    with pytest.raises(Exception, match="keys for"):
        made.without_surplus(total, 5, [keys[0][:1]])


def test_every_silo_opens_its_layers_and_the_charge_is_the_whole(tmp_path):
    made, (wrap, seen) = study(**REMOVE), between()
    live = run(tmp_path, made, wrap=wrap)
    live.go()
    (tap,) = seen
    step = joint_step(made, SIZE)
    needed = len(step.mechanism.layers[step.mechanism.surplus(4)])
    assert needed == 1
    assert len(tap.replies) == made.sums
    keys = [reply.keys for replies in tap.replies for reply in replies.values()]
    assert len(keys) == 4 * made.sums
    assert all(len(found) == needed for found in keys)
    assert len({key for found in keys for key in found}) == len(keys)
    assert not any("excess_kept" in record for record in live.store.state.history)
    assert [entry[2:] for entry in charged(tmp_path)] == [("settled", 4)] * made.sums
    event = step.event()
    assert isinstance(event, LayeredGaussian)
    assert 7.5 < claim([event] * made.sums, 1e-5).epsilon <= 8.0


def noises(directory, study, pulled=0):
    """The server's means, in σ of a coordinate that the charge is made with."""
    means, step = [], joint_step(study, SIZE)
    save = RunStore.save_mean

    def saved(self, mean, *rest):
        means.append(np.array(mean, dtype=np.float64)[pulled:])
        save(self, mean, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunStore, "save_mean", saved)
        run(directory, study).go()
    return np.concatenate(means) * study.local.batch_size / step.noise_multiplier


def test_the_server_s_mean_has_the_noise_of_the_charge(tmp_path):
    """Of four silos, one of which may collude: √(4/3) of it. Control: √(4/2) with all noise."""
    kept = noises(tmp_path / "keep", study(), pulled=2)
    left = noises(tmp_path / "remove", study(**REMOVE), pulled=2)
    assert kept.std() == pytest.approx(math.sqrt(4 / 2), rel=0.1)
    assert left.std() == pytest.approx(math.sqrt(4 / 3), rel=0.1)


def test_keys_of_others_would_not_do(tmp_path, monkeypatch):
    """Control of the test above: where a silo opens other keys than its own, noise is added."""
    monkeypatch.setattr(silo_module, "Layers", lambda keys: Layers([b"w" * 32] * len(keys)))
    spoilt = noises(tmp_path, study(**REMOVE), pulled=2)
    assert spoilt.std() > 1.15 * math.sqrt(4 / 2)


def test_layers_opened_for_a_larger_sum_leave_a_smaller_one_too_little():
    """Why a silo asks for statements: its share, cut for ten, in a sum of six to nine."""
    share, least, most, c = 1000.0, 6, 10, 1
    layers = [sigma**2 for sigma in layer_sigmas(share, least, most, c)]
    for survivors in range(least, most):
        whole = math.fsum(layers[: most - survivors + 1])
        cut = layers[0]
        promised = share**2 * (least - c)
        assert whole * (survivors - c) >= promised
        assert whole * (survivors - c - 1) + cut < 0.99 * promised


def test_where_a_silo_is_lost_nothing_is_opened(tmp_path):
    """Three silos need all of their noise."""
    wrap, (seen) = between(lost=lambda request: NAMES[3:])
    live = run(tmp_path, study(**REMOVE), wrap=wrap)
    live.go()
    assert seen[0].asked == []
    assert live.store.state.history[0]["survivors"] == list(NAMES[:3])


def test_a_silo_that_does_not_open_its_noise_costs_nothing_else(tmp_path):
    """Also one that sends too few keys: the noise stays, the sum is used, the others are heard."""
    wrap, _ = between(lost=lambda kind: NAMES[:1] if isinstance(kind, Surplus) else ())
    live = run(tmp_path, study(**REMOVE), wrap=wrap)
    live.go()
    assert {tuple(record["excess_kept"]) for record in live.store.state.history} == {NAMES[:1]}
    assert all(record["survivors"] == list(NAMES) for record in live.store.state.history)


def test_restarted_silos_open_nothing(tmp_path):
    """The keys of layers are in memory only: the sum that was under way keeps its noise."""
    made = study(**REMOVE)
    with pytest.raises(Killed):  # as the first sum's layers are asked for
        run(tmp_path, made, wrap=lambda engine: Dies(engine, 6, True)).go()
    again = run(tmp_path, made, resume=True)
    again.go()
    first, second = again.store.state.history
    assert first["excess_kept"] == list(NAMES)
    assert "excess_kept" not in second
    # Its update left in two attempts, so this silo cannot know which sum was opened.
    assert [entry[2] for entry in charged(tmp_path)] == ["released", *["settled"] * (made.sums - 1)]


def opened_statements(made, run_id, sum_, survivors, names):
    """What silos say that have opened this sum."""
    scope = run_scope(made, run_id)
    content = scope + sum_.to_bytes(4, "big") + names_digest(survivors)
    context = b"securefedcollm/v1/opened-sum"
    return {name: KEYS[name].sign(context, content) for name in names}


ATTACKS = {
    "two statements, three are needed": lambda r: {
        **r,
        "statements": dict([*r["statements"].items()][:2]),
    },
    "a smaller sum": lambda r: {**r, "survivors": list(NAMES[:3])},
    "another round": lambda r: {**r, "round": r["round"] + 1},
    "another run": lambda r: {**r, "run_id": b"q" * 16},
    "statements about another list": lambda r: {
        **r,
        "statements": opened_statements(study(**REMOVE), r["run_id"], r["round"], NAMES[:3], NAMES),
    },
    "statements about another round": lambda r: {
        **r,
        "statements": opened_statements(study(**REMOVE), r["run_id"], r["round"] + 1, NAMES, NAMES),
    },
    "one statement under every name": lambda r: {
        **r,
        "statements": dict.fromkeys(NAMES, r["statements"][NAMES[0]]),
    },
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_server_gets_no_layer_for_a_sum_that_is_not_the_only_one(tmp_path, attack):
    """Adversary: the server, which would open a smaller sum of the round with the same shares.

    Control: the same request as it should be gets the keys, in the other tests. A silo's own check
    is all that stands between: without it the attack gets them.
    """
    made = study(**REMOVE)

    def change(frames):
        first = decode_request(next(iter(frames.values())))
        if not isinstance(first, Surplus):
            return frames
        tree = {f: getattr(first, f) for f in first.__struct_fields__}
        return dict.fromkeys(frames, encode(Surplus(**ATTACKS[attack](tree))))

    wrap, seen = between(change=change)
    run(tmp_path / "checked", made, wrap=wrap).go()
    replies = [reply for each in seen[0].replies for reply in each.values()]
    assert replies
    assert all(isinstance(reply, Refused) for reply in replies)

    if attack in {"another round", "another run"}:
        return
    wrap, seen = between(change=change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(silo_module, "check_opened", lambda *rest: None)
        run(tmp_path / "unchecked", made, wrap=wrap).go()
    replies = [reply for each in seen[0].replies for reply in each.values()]
    assert all(isinstance(reply, Layers) and reply.keys for reply in replies)


def test_a_silo_states_only_what_it_opened(tmp_path):
    made, statements = study(**REMOVE), []

    class Listens(Between):
        def exchange(self, frames, timeout):
            replies = super().exchange(frames, timeout)
            for name, raw in replies.items():
                if isinstance(reply := decode_reply(raw, name), Unmasked):
                    statements.append((name, reply.statement))
            return replies

    live = run(tmp_path, made, wrap=Listens)
    live.go()
    assert len(statements) == 4 * made.sums
    scope = run_scope(made, live.store.run_id)
    for number, (name, statement) in enumerate(statements):
        sum_ = number // 4
        assert stated({name: statement}, ROSTER, scope, sum_, NAMES) == {name: statement}
        assert not stated({name: statement}, ROSTER, scope, sum_ + 1, NAMES)
        assert not stated({name: statement}, ROSTER, scope, sum_, NAMES[:3])


def test_without_the_key_nothing_is_asked(tmp_path):
    wrap, seen = between()
    run(tmp_path, study(), wrap=wrap).go()
    assert seen[0].asked == []
    assert "excess_noise" not in study().tree["privacy"]


LAYERED = LayeredGaussian(
    share_sigma=1000.0,
    sensitivity=1000,
    values=50,
    shares=6,
    colluders=1,
    design=1,
    least=6,
    most=10,
)


def test_more_survivors_cost_no_less():
    """Against server and colluders exactly, against fewer of them at most what is said."""
    plain = RoundedGaussian(share_sigma=1000.0, sensitivity=1000, values=50, shares=6, colluders=1)
    worst = claim([plain], 1e-5).epsilon
    for shares in range(6, 11):
        event = msgspec.structs.replace(LAYERED, shares=shares)
        assert claim([event], 1e-5).epsilon == pytest.approx(worst, rel=1e-6)
        assert dominates([LAYERED], [event])
        for known in (0, 1):
            (seen,) = seen_by([event], known)
            left = 1000.0**2 * 5 / (shares - 1) * (shares - known)
            assert seen.noise_multiplier * 1000 <= math.sqrt(left) * (1 + 1e-12)
    assert not dominates([plain], [LAYERED])
    assert not dominates([LAYERED], [plain])


def test_too_few_statements_are_shown_to_nobody(tmp_path, monkeypatch):
    """Adversary: silos whose statements are wrong, so that the others would note a lying server."""
    real = silo_module.state_opened

    def wrong(key, *rest):
        return bytes(64) if key.public in {KEYS[n].public for n in NAMES[:2]} else real(key, *rest)

    monkeypatch.setattr(silo_module, "state_opened", wrong)
    wrap, seen = between()
    live = run(tmp_path, study(**REMOVE), wrap=wrap)
    live.go()
    assert seen[0].asked == []
    assert all(record["excess_kept"] == list(NAMES) for record in live.store.state.history)


def test_hostile_keys_are_no_message(tmp_path):
    for keys in ([b"short"], [bytes(33)], [bytes(32)] * 129):
        with pytest.raises(RemoteProtocolError, match="does not decode"):
            decode_reply(msgspec.msgpack.encode(("layers", keys)), "silo-1")
    assert decode_reply(encode(Layers([bytes(32)])), "silo-1") == Layers([bytes(32)])
    assert "00" not in repr(Layers([bytes(32)]))


@pytest.mark.parametrize(
    "change",
    [
        {"design": 6},
        {"colluders": 6},
        {"least": 7},
        {"most": 5},
        {"most": 10**9},
        {"design": -1},
        {"share_sigma": 30.0, "most": 100, "shares": 90, "least": 90},
    ],
)
def test_impossible_layers_are_no_event(change):
    with pytest.raises(ConfigError):
        msgspec.structs.replace(LAYERED, **change)


def test_only_masked_sums_with_shared_noise_have_excess_noise():
    with pytest.raises(ConfigError, match="only masked sums"):
        make_study(privacy={"epsilon": 8.0, "delta": 1e-5, "excess_noise": "remove"})
    with pytest.raises(ConfigError, match="only masked sums"):
        study(**REMOVE, aggregation={"scheme": "ckks"})


def test_a_whole_update_has_layers_too(tmp_path):
    privacy = {"unit": "silo", "noise": "distributed", "epsilon": 8.0, "delta": 1e-5}
    made = make_study(
        privacy=privacy | {"clip_norm": 20.0, "excess_noise": "remove"},
        aggregation={"clip_norm": 20.0},
    )
    wrap, seen = between()
    live = run(tmp_path, made, wrap=wrap)
    live.go()
    assert len(seen[0].replies) == made.rounds
    unit = silo_unit(made, lambda round_: SIZE, 0)
    assert isinstance(unit.event(), LayeredGaussian)
    assert not any("excess_kept" in record for record in live.store.state.history)
