"""The front door, as somebody uses it who imports the package: no source read, paths as strings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import securefedcollm as sfc

STUDY = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
LIGHT = """
import sys
import numpy as np
import securefedcollm as sfc
assert set(sfc.__all__) <= set(dir(sfc))
sfc.plan_budget(sfc.load_study(sys.argv[1]))
sfc.secure_sum({name: np.arange(3) for name in "abc"})
sfc.verify(sys.argv[2])
assert not {"torch", "transformers", "pyarrow"} & set(sys.modules), "a heavy import"
"""


def test_the_ten_lines_of_the_package_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = sfc.load_study(STUDY, {"rounds": 1, "task.data.per_silo": 300})
    (plan,) = sfc.plan_budget(study)
    assert plan.epsilon == 8
    run = sfc.simulate(study, out=str(tmp_path / "mine"))
    methods = {(score.model, score.method) for score in run.table}
    assert methods == {(m, how) for m in ("slm", "llm") for how in ("zero-shot", "FedCoLLM")}
    assert all(0 < score.mean < 1 for score in run.table)
    assert len(run.epsilon) == 4
    assert all(spent is not None and 0 < spent <= 8 for spent in run.epsilon.values())
    assert (run.adapters / "slm" / "adapter_model.safetensors").is_file()
    found = sfc.verify(str(run.bundle()))
    assert found.holds
    assert found.rounds_done == 1
    # What needs no model loads none; a process of its own, since this one has loaded all.
    given = [sys.executable, "-c", LIGHT, STUDY, str(run.bundle(tmp_path / "copy.zip"))]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_sum_of_ones_own_vectors() -> None:
    draw = np.random.default_rng(1)
    whole = {f"clinic-{i}": draw.integers(-(10**9), 10**9, 50) for i in range(5)}
    np.testing.assert_array_equal(sfc.secure_sum(whole, colluders=1), sum(whole.values()))
    np.testing.assert_array_equal(
        sfc.secure_sum(whole, bound=2**40), sum(whole.values())
    )  # a bound above all of them
    floats = {name: draw.normal(size=1000) for name in "abc"}
    floats["c"] *= 100.0  # clipped
    clipped = [v * min(1.0, 40.0 / float(np.linalg.norm(v))) for v in floats.values()]
    total = sfc.secure_sum(floats, clip_norm=40.0)
    assert np.abs(total - sum(clipped)).max() < 40.0 * 2.0**-28


@pytest.mark.parametrize(
    ("vectors", "options", "said"),
    [
        ({"a": [1], "b": [2]}, {}, "2 silos"),
        ({"a": [1], "b": [2], "c": [3, 4]}, {}, "several shapes"),
        ({"a": [1.5], "b": [2.0], "c": [3.0, 4.0]}, {"clip_norm": 1.0}, "several shapes"),
        ({"a": [1.5], "b": [2.0], "c": [3.0]}, {}, "floats need clip_norm"),
        ({"a": [-(2**63)], "b": [2], "c": [3]}, {}, "bound"),
        ({"a": [1], "b": [2], "c": [3]}, {"clip_norm": 1.0}, "integers have none"),
        ({"a": [1], "b": [2], "c": [300]}, {"bound": 8}, "300 is beyond the bound 8"),
        ({"a": [], "b": [], "c": []}, {}, r"vectors\['a'\]"),
        ({"a": ["x"], "b": ["y"], "c": ["z"]}, {}, r"vectors\['a'\]"),
        ({"a": [2**63], "b": [2], "c": [3]}, {}, "bound"),
        ({"a": [1], "b": [2], "c": [3]}, {"colluders": 2}, "min_silos"),
        ({}, {}, "silos"),
    ],
)
def test_what_cannot_be_summed_is_refused_in_one_line(vectors, options, said) -> None:
    with pytest.raises(sfc.ConfigError, match=said) as refused:
        sfc.secure_sum(vectors, **options)
    assert refused.value.hint


def test_a_traceback_shows_what_to_do() -> None:
    with pytest.raises(sfc.ConfigError) as refused:
        sfc.load_study(STUDY, {"roundz": 1})
    assert refused.value.__notes__ == [refused.value.hint] == ["did you mean 'rounds'?"]
    with pytest.raises(sfc.ConfigError, match="rounds: cannot be written in a study"):
        sfc.load_study(STUDY, {"rounds": Path("2")})
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        sfc.simulat  # noqa: B018
