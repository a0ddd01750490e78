"""``study check`` sees what ``simulate`` would refuse of batch and privacy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from tests.support.inputs import make_inputs

QUICKSTART = "configs/quickstart.yaml"
OWN = ("--set", "task.data={}", "--set", "models.llm=none", "--set", "distillation={}")
JOINT = ("--set", "privacy.noise=distributed", "--set", "local.sampling_rate=0.02")
SILO = (
    *("--set", "privacy.unit=silo", "--set", "privacy.noise=distributed"),
    *("--set", "aggregation.clip_norm=1"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def invoke(*words: object):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def check(*words: object) -> dict:
    return json.loads(invoke("study", "check", *words, "--json").stdout)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["local.batch_size=33"], "local.batch_size: an expected batch of 33"),
        (["privacy.epsilon=50"], "privacy.epsilon: at ε = 50 the samplers"),
        (["privacy.delta=1e-20"], "privacy.delta: at ε = 8 the samplers"),
        (["task.data.skew=30", "local.batch_size=20"], "local.batch_size: an expected batch of 20"),
        (
            ["privacy.unit=subject", "privacy.subject=patient", "local.batch_size=32"],
            "local.batch_size: an expected batch of 32 needs as many subjects, there are ",
        ),
    ],
)
def test_what_simulate_refuses_is_refused_before(
    inputs: Path, tmp_path: Path, more: list[str], says: str
) -> None:
    words = [inputs / "tiny.yaml", "--data", inputs, *(w for m in more for w in ("--set", m))]
    found = []
    for command in (["study", "check"], ["simulate", "--out", tmp_path / "run", "--workers", "0"]):
        with pytest.raises(ConfigError) as caught:
            invoke(*command, *words)
        found.append((str(caught.value), caught.value.hint))
    assert found[0] == found[1]
    assert found[0][0].startswith(says)
    assert "\n" not in found[0][0]


@pytest.mark.parametrize("kind", [JOINT, SILO])
def test_noise_in_the_sum_is_planned_too(kind: tuple[str, ...]) -> None:
    words = [QUICKSTART, *kind, "--set", "privacy.clip_norm=1"]
    facts = check(*words)
    assert facts["noise_multiplier"] > 0.1
    # With a silo more than the sums need, what is charged is far above what it then costs.
    assert 0.8 * facts["epsilon"]["charged"] > facts["epsilon"]["hoped"] > 1.0
    assert "if all 4 silos are in every sum and nobody chose" in facts["reading"]["spends"]
    with pytest.raises(ConfigError, match=r"privacy.epsilon: at ε = 60 the samplers"):
        check(*words, "--set", "privacy.epsilon=60")
    with pytest.raises(ConfigError) as caught:
        check(*words, "--set", "aggregation.value_bits=8", "--set", "privacy.epsilon=0.05")
    assert caught.value.where == "aggregation.value_bits"


def test_a_joint_silo_larger_than_all_together() -> None:
    words = [QUICKSTART, *JOINT, "--set", "local.sampling_rate=0.1"]  # 256 of 2,560
    with pytest.raises(ConfigError, match=r"this silo has 3000 units, but .* only 2560"):
        check(*words)
    assert check(*words, "--records", "600")["units"] == [600]


def test_the_number_of_records_is_that_of_the_files(inputs: Path) -> None:
    words = [inputs / "tiny.yaml", "--data", inputs]
    assert check(*words)["units"] == [32] * 4
    assert check(words[0])["units"] == [32]  # as the study says, no file read
    silo = ["--silo", f"a={inputs / 'test.jsonl'}"]
    assert check(*words, *OWN, *silo)["units"] == [24]
    with pytest.raises(ConfigError, match="batch of 25 needs as many records, there are 24"):
        check(*words, *OWN, *silo, "--set", "local.batch_size=25")
    with pytest.raises(ConfigError, match="--silo: 'a' is not NAME=FILE"):
        check(*words, *OWN, "--silo", "a")
    with pytest.raises(ConfigError, match="--records: the files say"):
        check(*words, *OWN, *silo, "--records", "9")


def test_where_nobody_says_how_many_records_there_are(inputs: Path) -> None:
    facts = check(inputs / "tiny.yaml", *OWN)
    assert (facts["units"], facts["noise_multiplier"]) == ([], None)
    assert "--records or --silo" in facts["reading"]["noise"]
    planned = check(inputs / "tiny.yaml", *OWN, "--records", "32")
    assert planned["noise_multiplier"] > 0.1
    assert "32 records a silo as --records says" in planned["reading"]["noise"]
    with pytest.raises(ConfigError, match="residuals would take all of δ"):
        check(inputs / "tiny.yaml", *OWN, "--set", "privacy.delta=1e-20")  # no number would help


def test_what_only_the_ledger_refuses_is_refused_before() -> None:
    with pytest.raises(ConfigError) as caught:  # calibration finds noise that no ledger admits
        check(QUICKSTART, "--set", "privacy.epsilon=50")
    assert caught.value.where == "privacy.epsilon"
    assert "lower ε, here to 21;" in caught.value.hint
    assert check(QUICKSTART, "--set", "privacy.epsilon=21")["noise_multiplier"] > 0.1


def test_no_privacy_has_no_noise_to_plan() -> None:
    facts = check(QUICKSTART, "--set", "privacy=none")
    assert facts["noise_multiplier"] is None
    assert "noise" not in facts["reading"]
