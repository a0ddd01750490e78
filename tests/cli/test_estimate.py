"""``study check --estimate``, and the paper's pairs and sets: shapes are real, weights absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.hours import Rows, Seconds, time_of
from securefedcollm.study import load_study
from tests.support.inputs import make_inputs

SETS = {  # training questions
    "commonsense_qa": (9741, 1940),
    "openbookqa": (4957, 980),
    "arc_easy": (2251, 445),
    "arc_challenge": (1119, 220),
}
PAIRS = ("gpt2-pair", "opt-pair", "llama2-pair")


def configs():
    """The architectures of the paper's models, from their publications."""
    from transformers import GPT2Config, LlamaConfig, OPTConfig

    opt = {"vocab_size": 50272, "max_position_embeddings": 2048, "num_attention_heads": 32}
    llama = {"vocab_size": 32000, "max_position_embeddings": 4096}
    return {
        "gpt2": GPT2Config(),
        "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
        "opt-1.3b": OPTConfig(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, **opt),
        "opt-6.7b": OPTConfig(hidden_size=4096, num_hidden_layers=32, ffn_dim=16384, **opt),
        "sheared-llama-1.3b": LlamaConfig(
            hidden_size=2048, intermediate_size=5504, num_hidden_layers=24,
            num_attention_heads=16, **llama,
        ),
        "llama-2-7b": LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, **llama,
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for name, config in configs().items():
        config.save_pretrained(directory / name)
    return directory


def estimated(config, *overrides, data=None):
    arguments = ["study", "check", config, "--estimate", "--json"]
    for change in overrides:
        arguments += ["--set", change]
    result = CliRunner().invoke(app, [*arguments, *(["--data", str(data)] if data else [])])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)["estimate"]


def test_the_bytes_of_the_quickstart_are_those_of_a_real_round():
    """Measured in a run: 31,777 up, 95,664 down a silo and round; keys, shares, two adapters."""
    found = estimated("configs/quickstart.yaml")
    assert 0.9 < found["bytes_up_per_round"] / 31_777 < 1
    assert 0.9 < found["bytes_down_per_round"] / 95_664 < 1
    assert found["slm"]["parameters"] < found["llm"]["parameters"]


def test_what_decryptions_tell_is_counted_for_the_adapter_as_the_documentation_has_it():
    arguments = ["study", "check", "configs/consortium-10.yaml", "--estimate"]
    arguments += ["--set", "aggregation.scheme=ckks"]
    text = CliRunner().invoke(app, arguments).stdout
    (line,) = [line for line in text.splitlines() if line.startswith("decryptions tell")]
    page = Path("docs/privacy.md").read_text()
    assert f"$ securefedcollm {' '.join(arguments[:3])} --set aggregation.scheme=ckks" in page
    assert line in page.splitlines()
    assert "60 sums of 11,264 values" in line


@pytest.mark.parametrize(
    ("pair", "swap", "millions"),
    [
        ("gpt2-pair", {"llm": "gpt2-large", "slm": "gpt2"}, (774, 124)),
        ("opt-pair", {}, (6658, 1316)),
        ("llama2-pair", {"llm": "llama-2-7b"}, (6738, 1345)),
    ],
)
def test_the_papers_pairs_have_the_papers_sizes(models, pair, swap, millions):
    changes = [f"models.{m}={{source: 'path:{name}'}}" for m, name in swap.items()]
    found = estimated(f"configs/{pair}.yaml", *changes, "adapter.method=lora", data=models)
    for name, size in zip(("llm", "slm"), millions, strict=True):
        assert round(found[name]["parameters"] / 1e6) == size
    if pair == "gpt2-pair":  # the paper: 0.24 % of the SLM
        assert found["slm"]["adapter_values"] == 294_912
        assert round(found["slm"]["adapter_share"], 4) == 0.0024
    assert found["memory_bytes"]["server"] > found["llm"]["weights_bytes"]
    assert found["bytes_down_per_round"] == 2 * 4 * found["slm"]["adapter_values"]


@pytest.mark.parametrize("name", SETS)
def test_every_pair_and_set_can_be_dealt_out(tmp_path, name):
    count, part = SETS[name]
    rows = ({"question": f"q {i}", "choices": ["a", "b"], "answer": i % 2} for i in range(count))
    (tmp_path / f"{name}.train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / f"{name}.test.jsonl").write_text(
        json.dumps({"question": "t", "choices": ["a", "b"], "answer": 0}) + "\n"
    )
    changes = [f"task.data.{key}={part}" for key in ("public", "public_labelled", "per_silo")]
    changes += [f"task.data.{key}={name}.{key}.jsonl" for key in ("train", "test")]
    studies = [load_study(Path("configs") / f"{pair}.yaml", changes) for pair in PAIRS]
    dealt = deal(studies[0], tmp_path)
    assert [len(q) for q in dealt.silos.values()] == [part] * 4
    assert len(dealt.public) == part
    assert all(study.task == studies[0].task for study in studies)


def test_records_longer_than_the_positions_of_a_model_are_refused(models):
    changes = ["models.llm={source: 'path:gpt2'}", "models.slm={source: 'path:gpt2'}"]
    found = estimated("configs/gpt2-pair.yaml", *changes, "task.max_tokens=1024", data=models)
    assert found["slm"]["parameters"]
    says = r"task.max_tokens: 1025 tokens, the model path:gpt2 has positions for 1024"
    with pytest.raises(ConfigError, match=says):
        estimated("configs/gpt2-pair.yaml", *changes, "task.max_tokens=1025", data=models)


def test_a_target_that_fits_no_layer_is_refused(models):
    changes = ["models.llm={source: 'path:gpt2'}", "models.slm={source: 'path:gpt2'}"]
    for target, says in {"c_atn": "c_atn fits no module", "wte": "wte is Embedding"}.items():
        with pytest.raises(ConfigError, match=f"adapter.targets: {says}"):
            estimated(
                "configs/gpt2-pair.yaml", *changes, f"adapter.targets=[c_attn, {target}]",
                data=models,
            )  # fmt: skip


def test_a_family_without_attention_is_estimated(tmp_path):
    from transformers import MambaConfig

    MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2).save_pretrained(tmp_path / "m")
    changes = [f"models.{name}={{source: 'path:m'}}" for name in ("llm", "slm")]
    found = estimated(
        "configs/gpt2-pair.yaml", *changes, "adapter.targets=[in_proj]", data=tmp_path
    )
    assert found["memory_bytes"]["silo"] > found["slm"]["weights_bytes"]


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"opt-6.7b.*config.json cannot be read"):
        estimated("configs/opt-pair.yaml", data=tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    make_inputs(directory)
    return directory


@pytest.mark.parametrize(
    ("changes", "zero"),
    [
        ([], {"central"}),
        (["privacy=none", "adapter.top_layers=1", "distillation.over=all"], {"central"}),
        (["models.llm=none", "distillation={}", "server.central.steps=2"], {"distilled"}),
    ],
)
def test_hours_come_from_a_timed_sample(tiny, changes, zero):
    arguments = ["study", "check", str(tiny / "tiny.yaml"), "--data", str(tiny), "--hours"]
    for change in changes:
        arguments += ["--set", change]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["hours"]
    assert found["rows"] == {"silo": 32, "silos": 128, "public": 32, "test": 24}
    row = found["seconds_a_row"]
    assert {name for name, seconds in row.items() if seconds == 0} == zero
    assert found["silo_round_s"] == pytest.approx(2 * 8 * row["tuned"])
    assert "time, about" in CliRunner().invoke(app, arguments).stdout


def test_hours_without_data_are_refused(tiny):
    result = CliRunner().invoke(app, ["study", "check", str(tiny / "tiny.yaml"), "--hours"])
    assert isinstance(result.exception, ConfigError)
    assert "--data" in str(result.exception)


def test_a_study_takes_as_long_as_its_rows():
    study = load_study(
        Path("configs/quickstart.yaml"),
        ["local.steps=5", "local.batch_size=10", "distillation.steps=7", "rounds=2",
         "distillation.batch_labelled=1", "distillation.batch_unlabelled=2",
         "server.central={steps: 3, batch_size: 4}"],
    )  # fmt: skip
    row = Seconds(tuned=1.0, read=0.5, distilled=10.0, central=100.0, scored=2.0, shown=0.25)
    found = time_of(study, row, Rows(silo=6, silos=20, public=8, test=9))
    assert found["silo_round_s"] == 5 * 10
    assert found["server_round_s"] == 7 * 3 * 10 + 3 * 4 * 100 + (8 + 9) * 2
    assert found["frozen_layers_once_s"] == 20 * 0.5 + (8 + 9) * 0.25
    assert found["simulation_s"] == 14.25 + 2 * (4 * 50 + found["server_round_s"])
