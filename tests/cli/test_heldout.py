"""``client --test``: measured at the silo, told to its operator, never while a request waits."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from securefedcollm_cli.heldout import HELD_OUT, TRAINING, HeldOut, Undisturbed

from securefedcollm.federation.roles import ADAPTER, PROOF
from tests.support.inputs import invoke, make_inputs, tuned


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def silo(inputs, tmp_path_factory):
    """A silo's directory of a study with an adapter of round 1, and its held-out file."""
    directory = tmp_path_factory.mktemp("silo")
    test = tuned(inputs, directory / "whole")
    home = directory / "home"
    (home / "adapters").mkdir(parents=True)
    shutil.copytree(directory / "whole" / "adapters" / "slm", home / ADAPTER)
    shutil.copy(directory / "whole" / "study.yaml", home)
    (home / ADAPTER / PROOF).write_text(json.dumps({"round": 1}))
    return home, test


def measured(run, test, inputs, work=lambda held_out: held_out.finish()):
    told, warned = [], []
    tell = lambda which, round_, scores: told.append((round_, scores))  # noqa: E731
    with HeldOut(run, {HELD_OUT: test}, inputs, tell, warned.append) as held_out:
        work(held_out)
    return told, warned


@pytest.mark.soak
def test_every_round_is_measured_once_as_model_evaluate_does(silo, inputs, tmp_path):
    run = shutil.copytree(silo[0], tmp_path / "run")
    told, warned = measured(run, silo[1], inputs)
    assert warned == []
    command = ["model", "evaluate", "--run", run, "--data", inputs, "--test", silo[1], "--json"]
    base, tuned_ = invoke(*command, "--base"), invoke(*command)  # a silo's home has no LLM
    assert told == [(0, base), (1, tuned_)]
    lines = [json.loads(line) for line in (run / "held-out.jsonl").read_text().splitlines()]
    assert lines == [{"round": 0, **base}, {"round": 1, **tuned_}]
    assert not list(run.glob(".held-out-*"))
    assert measured(run, silo[1], inputs) == ([], [])  # the command was started again
    (run / ADAPTER / PROOF).write_text(json.dumps({"round": 2}))
    assert [round_ for round_, _ in measured(run, silo[1], inputs)[0]] == [2]
    out = invoke(
        "model", "merge", "--run", run, "--data", inputs, "--out", tmp_path / "m", "--json"
    )
    assert out["m"]["digest"]


@pytest.mark.soak
def test_the_silos_own_records_are_measured_beside_them(silo, inputs, tmp_path):
    run = shutil.copytree(silo[0], tmp_path / "run")
    train = tmp_path / "own.jsonl"
    train.write_text("".join(silo[1].read_text().splitlines(keepends=True)[:5]))
    files, told = {HELD_OUT: silo[1], TRAINING: train}, {}
    for _ in range(2):  # the second time, nothing is left to be measured

        def tell(which, round_, scores):
            assert told.setdefault((which, round_), scores) is scores  # once each

        with HeldOut(run, files, inputs, tell, pytest.fail) as held_out:
            held_out.finish()
    assert sorted(told) == [(which, round_) for which in sorted(files) for round_ in (0, 1)]
    assert {whole["all"]["count"] for (which, _), whole in told.items() if which == TRAINING} == {5}
    lines = [json.loads(line) for line in (run / "training.jsonl").read_text().splitlines()]
    assert lines == [{"round": round_, **told[TRAINING, round_]} for round_ in (0, 1)]
    assert not list(run.glob(".held-out-*"))


@pytest.mark.soak
def test_of_the_silos_own_records_only_those_that_take_part_count(silo, inputs, tmp_path):
    """The others have spent their budget: nothing is tuned on them."""
    run, own = shutil.copytree(silo[0], tmp_path / "run"), tmp_path / "own.jsonl"
    rows = silo[1].read_text().splitlines(keepends=True)[:6]
    own.write_text("".join(rows))
    part, told, warned = [True, False, True, True, False, True], {}, []

    def tell(which, round_, scores):
        told[which, round_] = scores

    files = {HELD_OUT: own, TRAINING: own}
    with HeldOut(run, files, inputs, tell, warned.append, {TRAINING: part}) as held_out:
        held_out.finish()
    assert warned == []
    assert {key: scores["all"]["count"] for key, scores in told.items()} == {
        **{(HELD_OUT, round_): 6 for round_ in (0, 1)},  # the control
        **{(TRAINING, round_): 4 for round_ in (0, 1)},
    }
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(row for row, here in zip(rows, part, strict=True) if here))
    command = ["model", "evaluate", "--run", run, "--data", inputs, "--test", kept, "--json"]
    assert told[TRAINING, 1] == invoke(*command)
    assert told[TRAINING, 1] != told[HELD_OUT, 1]
    first, _ = (run / "training.jsonl").read_text().splitlines(keepends=True)
    (run / "training.jsonl").write_text(first)  # the adapter is due again
    with HeldOut(run, {TRAINING: own}, inputs, tell, warned.append, {TRAINING: part}) as held_out:
        own.write_text("".join(rows[:5]))
        held_out.finish()
    assert "own.jsonl: 5 records, and there were 6 when the run began here" in warned[0]


def state_of(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_it_stands_still_while_a_request_is_answered(silo, inputs, tmp_path):
    """Adversary: a server that times answers to learn how many held-out records there are."""
    run = shutil.copytree(silo[0], tmp_path / "run")
    seen = []

    def work(held_out):
        class Port:
            def step(self, frame):
                seen.append(until(lambda: state_of(held_out._process) == "T"))
                return frame

        held_out.look()
        process = held_out._process
        assert until(lambda: state_of(process) in "RSD")  # the control: it runs
        assert Undisturbed(Port(), held_out).step(b"asked") == b"asked"
        assert seen == [True]
        before = Path(f"/proc/{process.pid}/stat").read_text().split()[13:15]
        time.sleep(0.3)
        assert Path(f"/proc/{process.pid}/stat").read_text().split()[13:15] == before
        held_out.look()
        assert until(lambda: state_of(process) in "RSD")
        held_out.pause()  # the client ends here: nothing is left behind
        seen.append(process)

    assert measured(run, silo[1], inputs, work) == ([], [])
    assert seen[1].returncode is not None
    assert not list(run.glob(".held-out-*"))


@pytest.mark.soak
def test_a_record_that_cannot_be_scored_stops_no_run(silo, inputs, tmp_path):
    run = shutil.copytree(silo[0], tmp_path / "run")
    test = tmp_path / "held-out.jsonl"
    test.write_text('{"question": "colour of thing1", "choices": ["red", "blue"], "answer": 7}\n')
    told, warned = measured(run, test, inputs)
    assert told == []
    assert len(warned) == 2
    assert "after round 0: error: " in warned[0]
    assert "held-out.jsonl:1" in warned[0]


def test_a_damaged_file_of_findings_is_named(silo, inputs, tmp_path):
    from securefedcollm.errors import StateError

    run = shutil.copytree(silo[0], tmp_path / "run")
    (run / "held-out.jsonl").write_text("{")
    with pytest.raises(StateError, match=r"held-out.jsonl: cannot be read"):
        HeldOut(run, {HELD_OUT: silo[1]}, inputs, print, print)
