"""Built-in models: made once, cached whole, the same every time (with tiny recipes)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, initialization

from securefedcollm.errors import StateError
from securefedcollm.tuning import builtin, making, recipe
from securefedcollm.tuning.identity import weights_digest
from securefedcollm.tuning.recipe import Progress

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


def in_threads(count: int, call: Any, *words: Any, **options: Any) -> None:
    threads = [threading.Thread(target=call, args=words, kwargs=options) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_askers_make_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    pretrain = builtin.pretrain

    def counted(role: Any, **options: Any) -> Any:
        made.append(role)
        return pretrain(role, **options)

    monkeypatch.setattr(builtin, "pretrain", counted)
    in_threads(2, builtin.builtin_models, "slm", cache_dir=tmp_path)
    assert made == ["slm"]


@pytest.mark.parametrize("locked", [True, False])
def test_threads_that_load_at_once_leave_the_library_as_it_was(
    locked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers replaces methods of its classes while it loads. Control: without our lock one
    thread puts back what the other had put there, and no model loaded later has tied weights."""
    builtin.builtin_models("slm", cache_dir=tmp_path)
    own, library = PreTrainedModel.tie_weights, initialization.no_tie_weights
    together, order, first_is_out = threading.Barrier(2), list[int](), threading.Event()

    @contextmanager
    def meeting() -> Iterator[None]:
        """Both threads are inside before one leaves, if they can; who came first leaves first."""
        with library():
            order.append(threading.get_ident())
            with suppress(threading.BrokenBarrierError):
                together.wait(1)
            yield
            if order[0] != threading.get_ident():
                first_is_out.wait()
        first_is_out.set()

    monkeypatch.setattr(initialization, "no_tie_weights", meeting)
    for place, name in ((PreTrainedModel, "tie_weights"), (torch, "linspace")):
        monkeypatch.setattr(
            place, name, getattr(place, name)
        )  # whatever happens, put back at the end
    if not locked:
        monkeypatch.setattr(recipe, "ONE_AT_A_TIME", nullcontext())
    in_threads(2, builtin.builtin_models, "slm", cache_dir=tmp_path)
    assert len(order) == 2
    assert (PreTrainedModel.tie_weights is own) == locked


def test_a_killed_pretraining_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builtin.builtin_models("slm", cache_dir=tmp_path, progress=killed)
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]
    builtin.builtin_models("slm", cache_dir=tmp_path)


class Saved:
    """What can be saved, made in 96 of 100 steps: the last part of a batch is left out."""

    def save_pretrained(self, directory: Path, **_: object) -> None:
        Path(directory).mkdir(exist_ok=True)
        (Path(directory) / "saved").touch()


def in_most_steps(progress: Progress) -> Saved:
    progress(96, 100, "pretraining")
    return Saved()


def test_what_was_made_in_other_processes_is_told_as_done(tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []
    made = making.Making("tiny", tmp_path / "models" / "tiny", 100, in_most_steps, Saved)
    making.make_all([made], lambda *report: reports.append(report))
    assert reports[-1][:2] == (100, 100)
    assert (made.directory / "saved").exists()


def test_an_unwritable_cache_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the directory should be")
    with pytest.raises(StateError, match=r"the model cache .* cannot be written"):
        builtin.prepare(tmp_path)
    with pytest.raises(StateError, match=r"the model cache .* cannot be written"):
        builtin.builtin_models("slm", cache_dir=tmp_path)
