"""Built-in models: made once, cached whole, the same every time (with tiny recipes)."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from securefedcollm.errors import StateError
from securefedcollm.tuning import builtin
from securefedcollm.tuning.identity import weights_digest

TINY = replace(
    builtin.RECIPES["slm"], hidden=16, layers=1, intermediate=32, sentences=1920, learning_rate=1e-2
)


@pytest.fixture(autouse=True)
def tiny_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(builtin.RECIPES, "slm", TINY)
    monkeypatch.setitem(builtin.RECIPES, "llm", replace(TINY, hidden=24, rare_share=0.0))


def test_made_once_then_read(tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []
    model, tokenizer = builtin.builtin_models(
        "slm", cache_dir=tmp_path, progress=lambda *report: reports.append(report)
    )
    assert reports[-1] == (1920, 1920, "pretraining slm")
    reports.clear()
    again, _ = builtin.builtin_models(
        "slm", cache_dir=tmp_path, progress=lambda *report: reports.append(report)
    )
    assert not reports
    assert weights_digest(again) == weights_digest(model)
    assert not model.training
    assert model.config.vocab_size == len(tokenizer)
    (entry,) = [p for p in (tmp_path / "models").iterdir() if p.is_dir()]
    assert (entry / "model.safetensors").is_file()


def test_pretraining_is_deterministic_and_learns(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = builtin.pretrain("slm", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert weights_digest(builtin.pretrain("slm", seed=1)) == weights_digest(first)
    assert weights_digest(builtin.pretrain("slm", seed=2)) != weights_digest(first)
    text = torch.from_numpy(builtin.world.World(0, public_seed=1).pretraining(64))
    with torch.no_grad():
        loss = first(input_ids=text, labels=text).loss.item()
    assert loss < 5.7  # a uniform guess over 432 words costs 6.07 nats


def test_a_changed_recipe_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builtin.builtin_models("slm", cache_dir=tmp_path)
    monkeypatch.setitem(builtin.RECIPES, "slm", replace(TINY, learning_rate=1.1e-2))
    builtin.builtin_models("slm", cache_dir=tmp_path)
    assert len([p for p in (tmp_path / "models").iterdir() if p.is_dir()]) == 2


def test_two_askers_make_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    pretrain = builtin.pretrain

    def counted(role: Any, **options: Any) -> Any:
        made.append(role)
        return pretrain(role, **options)

    monkeypatch.setattr(builtin, "pretrain", counted)
    threads = [
        threading.Thread(
            target=builtin.builtin_models, args=("slm",), kwargs={"cache_dir": tmp_path}
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["slm"]


def test_a_killed_pretraining_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builtin.builtin_models("slm", cache_dir=tmp_path, progress=killed)
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]
    builtin.builtin_models("slm", cache_dir=tmp_path)


def test_an_unwritable_cache_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the directory should be")
    with pytest.raises(StateError, match=r"the model cache .* cannot be written"):
        builtin.prepare(tmp_path)
    with pytest.raises(StateError, match=r"the model cache .* cannot be written"):
        builtin.builtin_models("slm", cache_dir=tmp_path)
