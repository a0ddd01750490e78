"""The front door, as somebody uses it who imports the package: no source read, paths as strings."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

import securefedcollm as sfc

ROOT = Path(__file__).parents[1]
(LINES,) = re.findall(
    r"## From Python\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
)
VECTORS = "import numpy as np\nv1, v2, v3 = np.arange(3), np.arange(3), np.arange(3)\n"
SHOWN = """
assert total.tolist() == [0, 3, 6]
assert {(s.model, s.method) for s in run.table} == {
    (model, how) for model in ("slm", "llm") for how in ("zero-shot", "FedCoLLM")
}
assert all(0 < score.mean < 1 for score in run.table)
assert len(run.epsilon) == 4
assert all(spent is not None and 0 < spent <= 8 for spent in run.epsilon.values())
assert (run.adapters / "slm" / "adapter_model.safetensors").is_file()
assert len(run.tensors("llm")) > 1
found = sfc.verify(str(run.bundle("copy.zip")))
assert found.holds
assert found.rounds_done == 2
print(sfc.__file__)
"""
LIGHT = """
import sys
import numpy as np
import securefedcollm as sfc
assert set(sfc.__all__) <= set(dir(sfc))
(plan,) = sfc.plan_budget(sfc.load_study("quickstart"))
assert plan.epsilon == 8
sfc.secure_sum({name: np.arange(3) for name in "abc"})
assert sfc.verify("copy.zip").holds
assert not {"torch", "transformers", "pyarrow"} & set(sys.modules), "a heavy import"
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, made from the sdist, and what it depends on."""
    place = tmp_path_factory.mktemp("elsewhere")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist")]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = (place / "dist").glob("*.whl")
    venv.create(place / "venv", symlinks=True)
    (site,) = (place / "venv" / "lib").glob("python3*/site-packages")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    # Dependencies are those of this environment; its editable install of this clone is no part.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return place


def outside(place: Path, program: str) -> str:
    done = subprocess.run(
        [str(place / "venv" / "bin" / "python"), "-I", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_lines_of_the_readme_run_from_a_wheel_outside_the_clone(elsewhere: Path) -> None:
    said = outside(elsewhere, VECTORS + LINES + SHOWN)
    assert Path(said.splitlines()[-1]).is_relative_to(elsewhere)
    outside(elsewhere, LIGHT)  # what needs no model loads none
    command = "import sys; from securefedcollm_cli.main import main; sys.exit(main())"
    program = f"import sys; sys.argv[1:] = ['study', 'check', 'quickstart']; {command}"
    assert "the study is sound" in outside(elsewhere, program)


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
        sfc.load_study("quickstart", {"roundz": 1})
    assert refused.value.__notes__ == [refused.value.hint] == ["did you mean 'rounds'?"]
    with pytest.raises(sfc.ConfigError, match="rounds: cannot be written in a study"):
        sfc.load_study("quickstart", {"rounds": Path("2")})
    with pytest.raises(sfc.ConfigError, match="no such file") as refused:
        sfc.load_study("quickstar")
    assert "finetune, " in refused.value.hint
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        sfc.simulat  # noqa: B018
