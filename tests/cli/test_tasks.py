"""Whole runs of other tasks than multiple choice, with two tokenizers, and what follows a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.numpy import load_file
from securefedcollm_cli.main import app
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.tuning.models import load_model
from tests.support.models import byte_level, sentence_piece

THINGS = ["newspaper", "paper", "café", "things", "today", "new things", "cool paper"]


def invoke(*words: Any, ok: bool = True) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def records(count: int, start: int) -> list[dict[str, Any]]:
    """Rows that serve every task."""
    rows = []
    for i in range(start, start + count):
        thing, other = THINGS[i % 7], THINGS[i // 7 % 7]
        rows.append(
            {
                "instruction": f"say {thing} {i}",
                "response": f"the {other} said {thing}",
                "text": f"the {thing} said {other} today {i}",
                "label": ["new", "naïve"][i % 2],
            }
        )
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = sentence_piece()
        shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
        llama = LlamaConfig(vocab_size=len(tokens), num_attention_heads=2, **shape)
        LlamaForCausalLM(llama).save_pretrained(directory / "llm")
        tokens.save_pretrained(directory / "llm")
        tokens = byte_level()
        gpt = GPT2Config(vocab_size=len(tokens), n_embd=16, n_layer=2, n_head=2, n_positions=64)
        gpt.update({"bos_token_id": 0, "eos_token_id": 0})
        GPT2LMHeadModel(gpt).save_pretrained(directory / "slm")
        tokens.save_pretrained(directory / "slm")
    for name, rows in (("train", records(98, 0)), ("test", records(10, 98))):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines)
    return directory


def study(directory: Path, **changed: Any) -> Path:
    data = {"train": "train.jsonl", "test": "test.jsonl", "public": 14, "per_silo": 28}
    tree: dict[str, Any] = {
        "study": "tasks",
        "rounds": 1,
        "task": {"data": data | {"public_labelled": 7}, "max_tokens": 48},
        "models": {"llm": {"source": "path:llm"}, "slm": {"source": "path:slm"}},
        "adapter": {"rank": 2},
        "silos": {"count": 3},
        "local": {"steps": 1, "batch_size": 8, "learning_rate": 0.01},
        "privacy": {"epsilon": 8, "delta": 1e-5},
        "distillation": {"steps": 2, "batch_labelled": 4, "batch_unlabelled": 4},
    }
    for key, value in changed.items():
        tree[key] = None if value is None else tree[key] | value
    path = directory / "tasks.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def simulate(inputs: Path, out: Path, **changed: Any) -> dict[str, Any]:
    path = study(out.parent, **changed)
    options = ["--data", inputs, "--out", out, "--workers", "0", "--no-baselines", "--json"]
    results: dict[str, Any] = json.loads(invoke("simulate", path, *options).stdout)
    return results


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instructions, a Llama and a GPT-2 with tokenizers of their own, distilled over tokens."""
    out = tmp_path_factory.mktemp("run") / "run"
    results = simulate(
        inputs, out, task={"kind": "instruction"}, distillation={"over": "all", "loss": "mutual-kl"}
    )
    assert results["evidence"]["holds"]
    assert any("share of the answers' tokens" in note for note in results["notes"])
    for silo in results["silos"]:
        assert 0 < silo["epsilon_spent"] <= 8
    return out


@pytest.mark.soak
def test_two_tokenizers_co_tune_on_instructions(run: Path) -> None:
    for role in ("llm", "slm"):
        adapter = load_file(run / "adapters" / role / "adapter_model.safetensors")
        assert any(v.any() for k, v in adapter.items() if "lora_B" in k)


@pytest.mark.parametrize(
    ("task", "over"),
    [({"kind": "text"}, "answer"), ({"kind": "classification", "labels": ["new", "naïve"]}, "all")],
)
def test_the_other_tasks_run(inputs: Path, tmp_path: Path, task: Any, over: str) -> None:
    plan = {"over": over, "steps": 1}
    results = simulate(inputs, tmp_path / "run", task=task, distillation=plan, privacy=None)
    scores = {row["model"] for row in results["table"] if row["method"] == "FedCoLLM"}
    assert scores == {"llm", "slm"}
    assert results["evidence"]["holds"]


def test_a_sheet_with_names_of_its_own_runs(inputs: Path, tmp_path: Path) -> None:
    """As a spreadsheet in Germany writes it; the template and the names go everywhere alike."""
    for name in ("train", "test"):
        rows = map(json.loads, (inputs / f"{name}.jsonl").read_text().splitlines())
        cells = (f'{row["text"]}; "cool";{row["label"]}'.split(";") for row in rows)
        lines = (
            '"' + a.replace('"', '""') + ";" + b.replace('"', '""') + f'";{c}' for a, b, c in cells
        )
        sheet = "\ufeffNotiz ;Station\r\n" + "".join(f"{line}\r\n" for line in lines)
        (tmp_path / f"{name}.csv").write_text(sheet, newline="")
    for name in ("llm", "slm"):
        (tmp_path / name).symlink_to(inputs / name)
    data = {"train": "train.csv", "test": "test.csv", "public": 14, "per_silo": 28}
    task = {"kind": "classification", "labels": ["new", "naïve"], "template": "{} paper"}
    task |= {
        "columns": {"text": "Notiz", "label": "Station"},
        "data": {**data, "public_labelled": 7},
    }
    results = simulate(tmp_path, tmp_path / "run", task=task, privacy=None)
    assert results["evidence"]["holds"]
    (row,) = [r for r in results["table"] if (r["model"], r["method"]) == ("slm", "FedCoLLM")]
    options = ["--data", tmp_path, "--json", "--max-tokens", "48"]
    command = ["model", "evaluate", "--run", tmp_path / "run", "--role", "slm", *options]
    scores = json.loads(invoke(*command, "--test", tmp_path / "test.csv").stdout)["all"]
    assert scores["accuracy"] == pytest.approx(row["accuracy"][""], abs=1e-6)
    assert json.loads(invoke(*command).stdout)["all"] == scores
    told = ["--task", "classification", "--label", "new", "--label", "naïve", "--json"]
    told += ["--column", "text=Notiz", "--column", "label=Station", "--max-tokens", "48"]
    adapter = ["--model", inputs / "slm", "--adapter", tmp_path / "run" / "adapters" / "slm"]
    alone = ["model", "evaluate", *adapter, "--test", tmp_path / "test.csv", *told]
    again = json.loads(invoke(*alone, "--template", "{} paper").stdout)["all"]
    assert again["confusion"] == scores["confusion"]
    assert [c["label"] for c in again["classes"]] == ["new", "naïve"]
    assert sum(map(sum, again["confusion"])) == again["count"] == 10
    right = sum(again["confusion"][c][c] for c in range(2))
    assert again["accuracy"] == pytest.approx(right / 10)
    for name in ("gold_log_prob", "macro_f1", "auroc"):
        assert again[name] == pytest.approx(scores[name])
    assert json.loads(invoke(*alone).stdout)["all"] != again  # another prompt
    one = [line for line in sheet.splitlines() if not line.endswith("naïve")]
    (tmp_path / "one.csv").write_text("\n".join(one))  # a label that no record has
    seen = invoke(*command[:-3], "--max-tokens", "48", "--test", tmp_path / "one.csv").stdout
    assert "not defined" in seen
    assert "Confusion" in seen
    invoke(
        "study", "deal", tmp_path / "tasks.yaml", "--data", tmp_path, "--out", tmp_path / "dealt"
    )
    mine = tmp_path / "dealt" / "silo-1.jsonl"
    assert set(json.loads(mine.read_text().splitlines()[0])) == {"prompt", "Station"}
    checked = ["data", "check", mine, "--study", tmp_path / "tasks.yaml", "--data", tmp_path]
    assert "nothing found" in invoke(*checked).stdout


@pytest.mark.parametrize("role", [pytest.param("llm", marks=pytest.mark.soak), "slm"])
def test_a_run_s_models_are_measured_again_and_merged(
    run: Path, inputs: Path, tmp_path: Path, role: str
) -> None:
    """The table's last line, from the adapter and from the merged model alike."""
    table = json.loads((run / "results.json").read_text())["table"]
    row = next(r for r in table if (r["model"], r["method"]) == (role, "FedCoLLM"))
    command = ["model", "evaluate", "--run", run, "--role", role, "--data", inputs, "--json"]
    scores = json.loads(invoke(*command).stdout)["all"]
    assert scores["accuracy"] == pytest.approx(row["accuracy"][""], abs=1e-6)
    assert scores["count"] == 10
    assert scores["perplexity"] > 1
    assert 0 <= scores["exact_match"] <= 1
    base = json.loads(invoke(*command, "--base").stdout)["all"]
    assert base["gold_log_prob"] != scores["gold_log_prob"]

    out = tmp_path / "whole"
    command = ["model", "merge", "--run", run, "--role", role, "--data", inputs, "--out", out]
    told = json.loads(invoke(*command, "--json").stdout)["whole"]
    assert told["digest"] == load_model(f"path:{out}").digest
    alone = ["model", "evaluate", "--model", out, "--task", "instruction", "--max-tokens", "48"]
    again = json.loads(invoke(*alone, "--test", inputs / "test.jsonl", "--json").stdout)["all"]
    assert again == pytest.approx(scores, rel=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert not any("lora" in name for name in plain.state_dict())
    assert AutoTokenizer.from_pretrained(out)("a paper")["input_ids"]


def test_generate_answers_an_instruction_as_the_task_put_it(run: Path, inputs: Path) -> None:
    command = ["model", "generate", "--run", run, "--role", "slm", "--data", inputs, "--json"]
    asked = json.loads(invoke(*command, "--prompt", "say paper 3", "--max-tokens", "4").stdout)
    framed = "Instruction: say paper 3\nResponse:"
    plain = json.loads(invoke(*command, "--plain", framed, "--max-tokens", "4").stdout)
    assert asked["text"] == plain["text"]
    assert asked["prompt"] == "say paper 3"


def test_wrong_options_are_named(run: Path, inputs: Path, tmp_path: Path) -> None:
    data = ["--data", inputs]
    for words, message in (
        (["evaluate", "--model", "path:slm"], "--test: no records"),
        (["evaluate"], "--run / --model: exactly one"),
        (["evaluate", "--run", run, "--task", "classification"], "--label: a classification"),
        (["evaluate", "--run", run, "--device", "moon"], "--device: torch cannot compute on"),
        (["merge", "--model", "path:slm", "--out", tmp_path / "m"], "--adapter: nothing to merge"),
        (["merge", "--run", run, "--out", inputs], "is not empty"),
    ):
        with pytest.raises(SecureFedCoLLMError, match=message) as caught:
            invoke("model", *words, *data)
        assert caught.value.hint
