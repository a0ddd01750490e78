"""The outer step in the round loop, without torch: kept across kills, refused where it diverges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from securefedcollm.errors import StateError, TrainingError
from securefedcollm.federation.serverparts import OuterStep
from tests.support.arithmetic import SIZE, ArithmeticServer, make_study
from tests.support.rounds import Dies, Killed, Run

NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.6}
ADAM = {"optimizer": "adam", "learning_rate": 0.05, "momentum": 0.9}


class OuterServer(ArithmeticServer):
    """Absorbs as the real server does. ``dies``: at the mean of which round, before the step."""

    def __init__(self, study: Any, dies: int | None = None) -> None:
        super().__init__()
        self.outer, self.dies = OuterStep(study), dies

    def absorb(self, mean: Any, round_: int) -> None:
        if round_ == self.dies:
            raise Killed
        self.theta = self.outer.take("all", self.theta, mean)

    def descent(self) -> dict[str, Any]:
        return {"theta": self.theta, **self.outer.state()}

    def restore_descent(self, state: Any) -> None:
        self.theta = self.outer.restore(state)["theta"]


def study(outer: Any = NESTEROV, **changes: Any) -> Any:
    return make_study(rounds=4, server={"outer": outer}, **changes)


def run(directory: Path, made: Any, dies: int | None = None, **options: Any) -> Run:
    return Run(directory, made, server=OuterServer(made, dies), **options)


@pytest.mark.parametrize("outer", [NESTEROV, ADAM], ids=["nesterov", "adam"])
@pytest.mark.parametrize("round_", [0, 1, 3])
def test_killed_between_the_sum_and_the_step(tmp_path: Path, outer: Any, round_: int) -> None:
    """The mean is out and the step is not taken: it is taken once, from the same memory."""
    made = study(outer)
    whole = run(tmp_path / "whole", made).go()
    with pytest.raises(Killed):
        run(tmp_path / "cut", made, dies=round_).go()
    again = run(tmp_path / "cut", made, resume=True)
    assert again.store.state.round == round_
    assert again.store.state.opened  # the sum is not asked for again
    np.testing.assert_array_equal(again.go(), whole)
    plain = run(tmp_path / "plain", make_study(rounds=4)).go()
    assert not np.array_equal(plain, whole)


@pytest.mark.parametrize("at", [1, 7, 9, 15, 22])
@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_exchange(tmp_path: Path, at: int, before: bool) -> None:
    made = study()
    whole = run(tmp_path / "whole", made).go()
    with pytest.raises(Killed):
        run(tmp_path / "cut", made, wrap=lambda e: Dies(e, at, before)).go()
    np.testing.assert_array_equal(run(tmp_path / "cut", made, resume=True).go(), whole)


def test_a_memory_that_is_lost_or_another_one_is_told_by_name(tmp_path: Path) -> None:
    """Without this a resumed run would go on with no momentum, and another result."""
    made = study()
    with pytest.raises(Killed):
        run(tmp_path, made, dies=2).go()
    (kept,) = (tmp_path / "server").glob("descent-*.safetensors")
    content = kept.read_bytes()
    kept.unlink()
    with pytest.raises(StateError, match=r"descent-00002-.*cannot be read"):
        run(tmp_path, made, resume=True).go()
    kept.write_bytes(content.replace(b"momentum", b"momentvm"))
    with pytest.raises(StateError, match=r"descent-.*momentvm.*are not"):
        run(tmp_path, made, resume=True).go()
    kept.write_bytes(content)  # the control
    whole = run(tmp_path / "whole", made).go()
    np.testing.assert_array_equal(run(tmp_path, made, resume=True).go(), whole)


def test_a_study_without_an_outer_optimiser_leaves_no_such_file(tmp_path: Path) -> None:
    run(tmp_path / "with", study()).go()
    assert len(list((tmp_path / "with" / "server").glob("descent-*"))) == 1
    run(tmp_path / "without", make_study()).go()
    assert not list((tmp_path / "without" / "server").glob("descent-*"))


def test_a_step_that_silos_would_refuse_is_refused_at_the_server() -> None:
    mean, point = np.full(SIZE, 0.1, np.float32), np.zeros(SIZE, np.float32)
    wild = {"optimizer": "sgd", "learning_rate": 2e3, "momentum": 0.0}
    for bad in (mean, mean * np.float32(np.nan)):
        with pytest.raises(TrainingError, match=r"above adapter.max_abs \(100\)") as caught:
            OuterStep(study(wild)).take("all", point, bad)
        assert "server.outer.learning_rate" in caught.value.hint
    step = OuterStep(study(wild | {"learning_rate": 10}))
    np.testing.assert_allclose(step.take("all", point, mean), 1.0, rtol=1e-6)
    norm = float(np.linalg.norm(mean))
    assert step.norms == pytest.approx({"mean_norm": norm, "step_norm": 10 * norm})
    baseline = OuterStep(study(wild), plain=True)
    np.testing.assert_array_equal(baseline.take("all", point, mean), mean)
    assert baseline.norms == {}
