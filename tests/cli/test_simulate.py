"""``simulate``: a whole run through the command line, on tiny models and real files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, DataError, SecureFedCoLLMError
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.files import alone
from securefedcollm.federation.runstore import check_directory
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import load_study
from tests.support.inputs import make_inputs

NO_PRIVACY = ["--set", "privacy=none"]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def run(inputs, out, *more, workers="0"):
    """Run the command in this process; the error that it would report, or its JSON."""
    arguments = ["simulate", str(inputs / "tiny.yaml"), "--data", str(inputs), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--workers", workers, "--json", *more])
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def adapters(out, which="slm"):
    return load_file(out / "adapters" / which / "adapter_model.safetensors")


def test_a_run_ends_with_table_ledger_and_adapters(inputs, tmp_path):
    results = run(inputs, tmp_path / "run")
    methods = {(row["model"], row["method"]) for row in results["table"]}
    assert methods == {
        ("slm", "zero-shot"),
        ("slm", "standalone"),
        ("slm", "FedAvg"),
        ("slm", "FedCoLLM"),
        ("llm", "zero-shot"),
        ("llm", "FedCoLLM"),
    }
    assert len(results["rounds"]) == 2
    for silo in results["silos"]:
        assert silo["records"] == 32
        assert 0 < silo["epsilon_spent"] <= 8
        assert set(silo["epsilon_by_adversary"].values()) == {silo["epsilon_spent"]}
        others = silo["epsilon_other_accountants"]
        assert set(others) == {"prv-accountant", "opacus"}
        assert all(0 < other <= silo["epsilon_spent"] + 0.01 for other in others.values())
        assert silo["bytes_up"] > 0
        assert silo["bytes_down"] > 0
    evidence = results.pop("evidence")
    assert evidence == {
        "bundle": str(tmp_path / "run" / "evidence.zip"),
        "report": str(tmp_path / "run" / "report.html"),
        "holds": True,
        "passed": 25,  # all but the study's signatures, which a simulation has not
    }
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    for which in ("slm", "llm"):
        moved = [v for k, v in adapters(tmp_path / "run", which).items() if "lora_B" in k]
        assert moved
        assert any(v.any() for v in moved)


ONE_MODEL = [
    *("--set", "models.llm=none", "--set", "distillation={}"),
    *("--set", "task.data.public=null", "--set", "task.data.public_labelled=0"),
]


@pytest.mark.soak
def test_one_model_is_enough(inputs, tmp_path):
    """Plain FedAvg: no large model, no public questions, and the same ε and evidence."""
    both, one = tmp_path / "both", tmp_path / "one"
    plain = run(inputs, both, *NO_PRIVACY)
    results = run(inputs, one, *NO_PRIVACY, *ONE_MODEL)
    rows = {(row["model"], row["method"]) for row in results["table"]}
    assert rows == {("slm", "zero-shot"), ("slm", "standalone"), ("slm", "FedAvg")}
    assert results["evidence"]["holds"]
    assert not (one / "adapters" / "llm").exists()
    assert not (one / "baselines" / "fedavg").exists()
    # The silos hold other questions, since none are public; with the same ones it is the baseline.
    kept = ["--set", "task.data.public=32", "--set", "task.data.public_labelled=8"]
    again = run(inputs, tmp_path / "kept", *NO_PRIVACY, *ONE_MODEL, *kept)
    fedavg = [row["accuracy"] for row in plain["table"] if row["method"] == "FedAvg"]
    assert [row["accuracy"] for row in again["table"] if row["method"] == "FedAvg"] == fedavg
    page = (one / "report.html").read_text()
    assert "large model" not in page
    shown = CliRunner().invoke(
        app, ["model", "evaluate", "--run", str(one), "--data", str(inputs), "--json"]
    )
    assert shown.exit_code == 0, shown.output
    measured = json.loads(shown.stdout)["all"]["accuracy"]
    last = next(row for row in results["table"] if row["method"] == "FedAvg")
    assert measured == pytest.approx(last["accuracy"][results["groups"][0]], abs=1e-6)
    asked = ["model", "evaluate", "--run", str(one), "--role", "llm", "--data", str(inputs)]
    refused = CliRunner().invoke(app, asked).exception
    assert isinstance(refused, ConfigError)
    assert "no large model" in refused.message


def test_one_model_is_tuned_privately(inputs, tmp_path):
    results = run(inputs, tmp_path / "run", *ONE_MODEL, "--no-baselines")
    assert results["evidence"]["holds"]
    assert all(0 < silo["epsilon_spent"] <= 8 for silo in results["silos"])


def test_a_study_can_protect_whole_patients(inputs, tmp_path):
    change = ["--set", "privacy.unit=subject", "--set", "local.batch_size=2", "--no-baselines"]
    out = tmp_path / "run"
    run(inputs, out, *change, "--set", "privacy.subject=patient")
    for number in range(1, 5):
        name = f"silo-{number}"
        with Ledger(out / "silos" / name / "ledger.sqlite", name) as ledger:
            entries = ledger.entries()
        assert [entry.key.unit for entry in entries] == ["subject"] * 2
        assert [entry.reserved[0].q for entry in entries] == [2 / 8] * 2  # 32 records, 8 patients
    with pytest.raises(DataError, match=r"train.jsonl:1: field 'doctor' is missing"):
        run(inputs, tmp_path / "other", *change, "--set", "privacy.subject=doctor")


JOINT = [
    *("--set", "privacy.noise=distributed"),
    *("--set", "local={steps: 2, batch_size: 32, learning_rate: 0.01, sampling_rate: 0.25}"),
    *("--set", "aggregation.value_bits=20"),
]


def test_joint_dp_sgd_runs_drops_a_silo_and_leaves_evidence_that_holds(inputs, tmp_path):
    results = run(inputs, tmp_path / "run", *JOINT, "--no-baselines", "--drop", "2@upload:1")
    assert [len(r["survivors"]) for r in results["rounds"]] == [3, 4]  # gone in step 1
    spent = [silo["epsilon_spent"] for silo in results["silos"]]
    assert all(0 < epsilon <= 8 for epsilon in spent)
    assert results["evidence"]["holds"]
    assert results["evidence"]["passed"] >= 25
    with Ledger(tmp_path / "run" / "silos" / "silo-1" / "ledger.sqlite", "silo-1") as ledger:
        entries = ledger.entries()
    assert [(e.key.round, e.key.unit, e.state) for e in entries] == [
        (step, "record", "settled") for step in range(4)
    ]
    assert entries[0].counted[0].shares == 3


def test_client_level_privacy_runs_and_says_what_each_adversary_could_learn(inputs, tmp_path):
    change = ["--set", "privacy.unit=silo", "--set", "privacy.noise=distributed"]
    change += ["--set", "privacy.adaptive={quantile: 0.7}", "--no-baselines"]
    results = run(inputs, tmp_path / "run", *change, "--drop", "2@upload:1")
    assert results["rounds"][0]["clip_norm"] == 1.0 != results["rounds"][1]["clip_norm"]
    for silo in results["silos"]:
        found = silo["epsilon_by_adversary"]
        assert 0 < found["server"] == found["outsider"] < found["server+1 silo"] <= 8
        assert silo["epsilon_spent"] == found["server+1 silo"]
    assert results["evidence"]["holds"]
    # silo-2 does not know what became of round 1 and stays charged at the worst case; the others
    # had the same three shares in round 1, and all four in round 2.
    assert len({silo["epsilon_spent"] for silo in results["silos"]}) == 1
    assert results["silos"][0]["epsilon_spent"] < 7.5
    assert results["evidence"]["passed"] == 25


def test_the_saved_adapters_load_with_peft(inputs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run(inputs, tmp_path / "run", "--no-baselines")
    # PEFT asks for an attribute by its old name
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    for which in ("slm", "llm"):
        base = AutoModelForCausalLM.from_pretrained(inputs / which)
        model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapters" / which)
        assert model.peft_config["default"].r == 2


def test_the_same_seed_gives_the_same_run_and_workers_change_nothing(inputs, tmp_path):
    """Without DP; keys and run ids differ, and masks cancel exactly."""
    runs = [
        run(inputs, tmp_path / name, *NO_PRIVACY, "--no-baselines", workers=workers)
        for name, workers in (("a", "0"), ("b", "0"), ("c", "2"))
    ]
    assert len({r["run_id"] for r in runs}) == 3
    assert runs[0]["table"] == runs[1]["table"] == runs[2]["table"]
    for which in ("slm", "llm"):
        first, *others = (adapters(tmp_path / name, which) for name in "abc")
        for other in others:
            for key, value in first.items():
                np.testing.assert_array_equal(value, other[key])


@pytest.mark.soak
def test_the_figure_of_a_validated_run_is_that_of_the_part_that_spent_most(inputs, tmp_path):
    """What is set aside pays apart from what is tuned on, and here more."""
    more = ["--no-baselines", "--set", "validation.share=0.3", "--set", "local.batch_size=4"]
    results = run(inputs, tmp_path / "run", *more)
    for number in (1, 4):
        silo = f"silo-{number}"
        with Ledger(tmp_path / "run" / "silos" / silo / "ledger.sqlite", silo) as ledger:
            tuned, held = dict.fromkeys(entry.key[:2] for entry in ledger.entries())
            least, most = (ledger.spent(*part, 1e-5).claim.epsilon for part in (tuned, held))
        assert least < most
        assert results["silos"][number - 1]["epsilon_spent"] == most
    assert all("private" in record for record in results["rounds"])


def test_states_on_disk_serve_the_next_run(inputs, tmp_path):
    """Those of the server's questions are kept, and no silo's."""
    more = ["--no-baselines", "--set", "adapter.top_layers=1", "--states", str(tmp_path / "states")]
    first = run(inputs, tmp_path / "one", *more, *NO_PRIVACY)
    kept = {path for path in (tmp_path / "states").rglob("*") if path.is_file()}
    made = {path: path.stat().st_ino for path in kept}  # a file that is written again is a new one
    second = run(inputs, tmp_path / "two", *more, *NO_PRIVACY)
    assert second["table"] == first["table"]
    assert made == {path: path.stat().st_ino for path in kept}
    dealt = deal(load_study(inputs / "tiny.yaml"), inputs)
    served = {q.prompt for q in (*dealt.public, *dealt.test)}  # a choice is a token: not in the row
    assert len(kept) == 2 * len(served)  # two models


@pytest.mark.parametrize("method", ["lora", "rolora"])
def test_the_other_adapter_methods_run(inputs, tmp_path, method):
    change = ["--set", f"adapter.method={method}", "--set", "distillation.loss=mutual-kl"]
    results = run(inputs, tmp_path / "run", *change, "--no-baselines")
    assert len(results["rounds"]) == 2


def test_a_dropout_is_survived_and_named(inputs, tmp_path):
    results = run(inputs, tmp_path / "run", "--no-baselines", "--drop", "2@upload:1")
    first, second = results["rounds"]
    assert first["survivors"] == ["silo-1", "silo-3", "silo-4"]
    assert first["dropouts"] == {"silo-2": "dropped on purpose at upload"}
    assert len(second["survivors"]) == 4


@pytest.mark.soak
def test_killed_with_minus_nine_and_resumed(inputs, tmp_path):
    """A real process group, killed while round 2 is under way. What its workers warn of is seen."""
    out = tmp_path / "run"
    command = [
        str(Path(sys.executable).with_name("securefedcollm")),
        *("simulate", str(inputs / "tiny.yaml"), "--data", str(inputs), "--out", str(out)),
        *("--workers", "2", "--no-baselines", "--json", "--set", "rounds=3"),
        *("--set", "aggregation.clip_norm=0.01"),
    ]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    state = out / "server" / "state.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if state.exists() and json.loads(state.read_text())["round"] == 1:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = json.loads(state.read_text())["round"]
    assert finished < 3
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert "silo-4: round 3: the update is scaled down" in resumed.stderr
    assert "INFO" not in resumed.stderr
    results = json.loads(resumed.stdout)
    assert [r["round"] for r in results["rounds"]] == [1, 2, 3]
    assert results["run_id"] == json.loads(state.read_text())["run_id"]
    for silo in results["silos"]:
        assert 0 < silo["epsilon_spent"] <= 8  # three rounds fit the budget exactly; four would not
    assert results["evidence"]["holds"]  # the logs of before the kill and of after it are one
    assert results["evidence"]["passed"] == 25


class Killed(Exception):
    """What a kill looks like from inside: nothing after it is run."""


@pytest.mark.soak
def test_a_resumed_run_refuses_other_records(inputs, tmp_path, monkeypatch):
    """One word of one record, between a kill and `--resume`: without this, ε was overspent."""
    from securefedcollm.federation.cotuning import ServerTuning

    place = tmp_path / "inputs"
    shutil.copytree(inputs, place)
    distil = ServerTuning.distil

    def killed_in_round_2(self, round_, progress):
        if round_:
            raise Killed
        return distil(self, round_, progress)

    monkeypatch.setattr(ServerTuning, "distil", killed_in_round_2)
    command = ["simulate", place / "tiny.yaml", "--data", place, "--out", tmp_path / "run"]
    words = [str(w) for w in (*command, "--workers", "0", "--no-baselines", "--json")]
    assert isinstance(CliRunner().invoke(app, words).exception, Killed)
    monkeypatch.setattr(ServerTuning, "distil", distil)
    train = place / "train.jsonl"
    agreed = train.read_bytes()
    lines = agreed.splitlines(keepends=True)
    train.write_bytes(b"".join(line.replace(b"colour of", b"colour for") for line in lines))
    with pytest.raises(ConfigError, match=r"silo-1: these are not the records.*it began with"):
        run(place, tmp_path / "run", "--no-baselines", "--resume")
    train.write_bytes(agreed)  # the control
    results = run(place, tmp_path / "run", "--no-baselines", "--resume")
    assert results["evidence"]["holds"]
    assert all(silo["epsilon_spent"] <= 8 for silo in results["silos"])


def test_ckks_gives_the_same_models_as_masking(inputs, tmp_path):
    """Precise sums are exact, so the same integers (19 bits fill masking's fields) make the same
    adapters, bit for bit, under either key model. A silo that is lost in the middle is left out:
    by a fresh key, or by the authority, which is one more participant with a log of its own."""
    fixed = [
        *NO_PRIVACY,
        "--no-baselines",
        "--set",
        "aggregation.value_bits=19",
        "--set",
        "rounds=1",
    ]
    masked = run(inputs, tmp_path / "masking", *fixed, "--drop", "2@share:1")
    ckks = ["--set", "aggregation.scheme=ckks", "--drop", "2@encrypt:1"]
    for model in ("threshold", "authority"):
        key_model = ["--set", f"aggregation.key_model={model}"]
        sealed = run(inputs, tmp_path / model, *fixed, *ckks, *key_model)
        assert sealed["table"] == masked["table"]
        survivors = [r["survivors"] for r in sealed["rounds"]]
        assert survivors == [r["survivors"] for r in masked["rounds"]]
        assert len(survivors[0]) == 3
        for which in ("slm", "llm"):
            expected = adapters(tmp_path / "masking", which)
            for key, value in adapters(tmp_path / model, which).items():
                np.testing.assert_array_equal(value, expected[key])
        assert sealed["evidence"]["holds"]
    assert (tmp_path / "authority" / "authority" / "evidence.sqlite").exists()
    assert "its worth is that it runs elsewhere" in " ".join(sealed["notes"])


def test_client_level_privacy_runs_under_ckks(inputs, tmp_path):
    change = ["--set", "privacy.unit=silo", "--set", "privacy.noise=distributed"]
    ckks = ["--set", "aggregation.scheme=ckks", "--set", "rounds=1"]
    results = run(inputs, tmp_path / "run", *change, *ckks, "--no-baselines")
    assert len(results["rounds"][0]["survivors"]) == 4
    assert all(0 < silo["epsilon_spent"] <= 8 for silo in results["silos"])


JOINT_WITHOUT_ROOM = [
    *("--set", "privacy.noise=distributed", "--set", "local.sampling_rate=1.0"),
    *("--set", "aggregation.value_bits=20"),
]
"""Only a silo finds out: it has more records than the study thinks all have together."""


def broken_line(directory: Path) -> None:
    lines = (directory / "train.jsonl").read_text().splitlines()
    lines[4] = '{"question": "colour of'
    (directory / "train.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "rounds=x"], "rounds: expected `int`"),
        (["--set", "adaptor.rank=2"], "adaptor: unknown key"),
        (["--set", "task.data.train=none.jsonl"], "none.jsonl"),
        (["--set", "models.slm.source=path:nowhere"], "path:nowhere"),
        (["--set", "adapter.layout=" + "a" * 64], "adapter.layout: this model's adapter"),
        (["--set", "models.slm.sha256=" + "b" * 64], "the study pins bbbb"),
        (["--set", "adapter.targets=[nothing]"], "adapter.targets: nothing fits no module"),
        (["--set", "adapter.targets=[q_proj, v_porj]"], "adapter.targets: v_porj fits no module"),
        (["--set", "adapter.targets=[q_proj, embed_tokens]"], "embed_tokens is Embedding"),
        (["--set", "task.data.per_silo=1000"], "task.data: the study needs"),
        (["--set", "local.batch_size=33"], "local.batch_size: an expected batch of 33"),
        (["--set", "privacy=none", "--set", "local.learning_rate=9e29"], "not finite"),
        (JOINT_WITHOUT_ROOM, "local.sampling_rate: this silo has 32 units"),
        (["--drop", "9@upload"], "there is no silo '9'"),
        (["--drop", "2@lunch"], "is not SILO@STEP"),
        (["--resume"], "there is no run to resume"),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(inputs, tmp_path, more, message):
    with pytest.raises(SecureFedCoLLMError) as caught:
        run(inputs, tmp_path / "run", "--no-baselines", *more)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # A failed start leaves nothing; one that got as far as training can go on.
    assert (tmp_path / "run").exists() == (message == "not finite")


def test_a_start_that_fails_does_not_remove_the_run_that_is_there(inputs, tmp_path):
    run(inputs, tmp_path / "run", *NO_PRIVACY, *ONE_MODEL, "--no-baselines")
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(SecureFedCoLLMError, match="fits no module"):
        run(inputs, tmp_path / "run", "--overwrite", "--set", "adapter.targets=[nothing]")
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    with pytest.raises(SecureFedCoLLMError, match="there is a run in this directory already"):
        run(inputs, tmp_path / "run")


def test_two_processes_do_not_write_to_one_run(inputs, tmp_path):
    """Such as an ``ask`` of the run; what it leaves behind does not make a directory a stranger."""
    (tmp_path / "run").mkdir()
    with (
        alone(tmp_path / "run", "taken", "wait"),
        pytest.raises(SecureFedCoLLMError, match="another process works in this directory"),
    ):
        run(inputs, tmp_path / "run", "--overwrite")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    check_directory(
        load_study(inputs / "tiny.yaml"), tmp_path / "run", resume=False, overwrite=True
    )


def test_a_broken_line_is_named_and_the_process_exits_with_2(tmp_path):
    make_inputs(tmp_path)
    command = [str(Path(sys.executable).with_name("securefedcollm")), "simulate"]
    done = subprocess.run(
        [*command, str(tmp_path / "tiny.yaml"), "--data", str(tmp_path), "--out", "/proc/x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: /proc/x: cannot be written" in done.stderr  # behind what loads the models
    assert "Traceback" not in done.stderr
    broken_line(tmp_path)
    done = subprocess.run(
        [*command, str(tmp_path / "tiny.yaml"), "--data", str(tmp_path), "--out", tmp_path / "o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "train.jsonl:5:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.soak
def test_a_run_is_not_overwritten_unasked_and_a_stranger_directory_never(inputs, tmp_path):
    run(inputs, tmp_path / "run", "--no-baselines", "--set", "rounds=1")
    with pytest.raises(SecureFedCoLLMError, match="there is a run in this directory already"):
        run(inputs, tmp_path / "run", "--no-baselines", "--set", "rounds=1")
    run(inputs, tmp_path / "run", "--no-baselines", "--set", "rounds=1", "--overwrite")
    stranger = tmp_path / "home"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    with pytest.raises(SecureFedCoLLMError, match="is not a run directory"):
        run(inputs, stranger, "--overwrite")
    assert (stranger / "thesis.tex").exists()
