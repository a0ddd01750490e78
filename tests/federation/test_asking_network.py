"""Members that ask each other through the server: found, counted, relayed, killed, restarted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from securefedcollm_audits.verification.merge import merge
from securefedcollm_audits.verification.verify import verify

from securefedcollm.evidence.entries import Asked, Counted, Heard, Served
from tests.support.asking import TEXTS
from tests.support.network import SILOS, Network, Signed, shape


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    return Signed(tmp_path_factory.mktemp("signed"))


@pytest.fixture
def network(signed: Signed, tmp_path: Path) -> Iterator[Network]:
    shutil.copytree(signed.homes["server"].parent, tmp_path / "homes")
    homes = {name: tmp_path / "homes" / path.name for name, path in signed.homes.items()}
    fresh = signed.members.afresh(tmp_path / "shelves")
    made = Network(signed, homes, fresh.indexes)
    yield made
    made.close()


def kinds(network: Network, name: str) -> list[type]:
    log = network.wire.ports[name]._log if name in SILOS else network.relay.engine._port._log
    return [type(entry.what) for entry in log.entries[1:]]


def verified(network: Network, directory: Path) -> None:
    """Everybody's evidence by itself, and all of it together."""
    bundles = network.bundles(directory)
    whole = directory / "all.zip"
    whole.write_bytes(merge(bundles))
    for bundle in (*bundles, whole):
        verdict = verify(bundle)
        assert verdict.holds, [(check.name, check.faults) for check in verdict.failed]


def test_a_silo_and_the_server_ask_over_the_network(network, tmp_path):
    found = network.ask("silo-1", TEXTS["silo-3"][2])
    assert (found.hits[0].silo, found.hits[0].passage.text) == ("silo-3", TEXTS["silo-3"][2])
    assert found.answered == ["silo-2", "silo-3"]
    assert (found.failed, found.suspect) == ({}, {})
    found = network.ask("server", TEXTS["silo-1"][0])
    assert found.hits[0].passage.text == TEXTS["silo-1"][0]
    assert found.answered == list(SILOS)
    assert kinds(network, "silo-1") == [Asked, Heard, Counted, Served]
    assert kinds(network, "server") == [Asked, Heard]
    verified(network, tmp_path)


def test_two_members_ask_at_once(network, tmp_path):
    asked = {name: network.hand_in(name, TEXTS["silo-2"][0]) for name in ("silo-1", "silo-3")}
    for name, waiting in asked.items():
        assert set(network.turns(waiting).fetched.fetches) == set(SILOS) - {name}
    verified(network, tmp_path)


def view(network: Network, words: str) -> list[object]:
    """What the server, and each silo, sees of a question: all that crosses, in order."""
    network.wire.seen.clear()
    network.ask("silo-1", words)
    return [(silo, way, shape(frame)) for silo, way, frame in network.wire.seen]


def test_server_and_silos_see_the_same_of_two_questions(network):
    useful = view(network, TEXTS["silo-2"][0])
    crossed = [kind for *_, (_, _, inner) in useful for _, kind, *_ in inner]
    assert sorted(set(crossed)) == ["blocks", "question", "scores", "selection"]
    assert len(crossed) == 16  # two silos, four frames, each into the server and out of it
    assert view(network, "w99 w98 w97") == useful


@pytest.mark.parametrize(
    ("weakened", "how"),
    [
        # The number of blocks follows from what was found.
        ("securefedcollm.retrieval.asker.Asker.select", "only what scored well"),
        # Rows that hold nothing are not sent.
        ("securefedcollm.retrieval.product.Encrypted.rows", "no padding"),
    ],
)
def test_without_a_fixed_k_or_padding_the_view_tells_questions_apart(
    network, monkeypatch, weakened, how
):
    """Positive control of the test before."""
    from securefedcollm.federation.questions.inquiry import Fetching
    from securefedcollm.retrieval import asker as asking

    if how == "only what scored well":
        real = Fetching.steps

        def fewer(self, query):
            """Silos without a good match are not asked for blocks."""
            steps = real(self, query)
            frames = next(steps)
            answers = yield frames
            frames = steps.send(answers)
            self.dropped = set(frames) - {"silo-2"} if query[0] > 0 else set()
            answers = yield {s: f for s, f in frames.items() if s not in self.dropped}
            try:
                steps.send(answers)
            except StopIteration as end:
                return end.value

        monkeypatch.setattr(Fetching, "steps", fewer)
    else:
        real_sign = asking.sign

        def trimmed(message, key):
            rows = getattr(message, "rows", None)
            if rows is not None:  # as much as its author had to say
                cut = len(rows) - 64 * (int.from_bytes(message.seed[:1], "big") % 2 + 1)
                message = msgspec.structs.replace(message, rows=rows[:cut])
            return real_sign(message, key)

        monkeypatch.setattr(asking, "sign", trimmed)
    views = [view(network, words) for words in ("w1 w2 w3 w4", "w99 w98 w97", "w9 w10")]
    assert len({str(each) for each in views}) > 1


def test_a_silo_that_is_down_costs_itself_alone(network, tmp_path):
    del network.wire.ports["silo-2"]
    found = network.ask("silo-1", "w1 w2")
    assert found.answered == ["silo-3"]
    assert found.failed == {"silo-2": "is not connected to the server"}
    network.now += 10  # it is called again
    network.wire.ports["silo-2"] = (
        network.start("silo-2")
        if False
        else network.wire.ports.get("silo-2", None) or _back(network)
    )
    assert network.ask("silo-1", "w1 w2").answered == ["silo-2", "silo-3"]
    verified(network, tmp_path)


def _back(network: Network):
    network._stacks.pop("silo-2").close()
    return network.start("silo-2")
