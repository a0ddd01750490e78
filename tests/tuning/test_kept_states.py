"""States of frozen layers on disk: the same values, made once, bounded, and damage is noticed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from securefedcollm.errors import StateError
from securefedcollm.tuning.frozen import with_prefix
from securefedcollm.tuning.kept_states import KeptStates, keeping_states
from securefedcollm.tuning.packing import row_limit

BASE = b"\7" * 32


class Counted:
    """A model, and how many rows went through its first layer."""

    def __init__(self, model: Any) -> None:
        self.model, self.rows = model, 0
        row_limit(model)  # tries the model once
        model.model.layers[0].register_forward_hook(self._count)

    def _count(self, layer: Any, given: Any, states: Any) -> None:
        self.rows += len(given[0])


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_text_is_read_once(toy: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    counted, data = Counted(toy.model(dtype=dtype)), toy.encoded(10)
    plain = with_prefix(counted.model, data, 1).prefix
    assert counted.rows == 10
    with keeping_states(tmp_path):
        first = with_prefix(counted.model, data.select(torch.arange(6)), 1, public=BASE)
        assert counted.rows == 16
        assert len(files(tmp_path)) == 6
        every = with_prefix(counted.model, data, 1, public=BASE)
        assert counted.rows == 20  # the other four
        again = with_prefix(counted.model, data, 1, public=BASE)
        assert counted.rows == 20
    assert first.prefix is not None
    assert every.prefix is not None
    assert again.prefix is not None
    assert plain is not None
    assert again.prefix.dtype == dtype
    for row in range(10):
        length = int((data.segments[row] >= 0).sum())
        kept = every.prefix[row, :length]
        torch.testing.assert_close(kept, plain[row, :length])
        assert torch.equal(kept, again.prefix[row, :length])
        if row < 6:
            assert torch.equal(kept, first.prefix[row, :length])


def test_another_model_layer_or_text_is_another_file(toy: Any, tmp_path: Path) -> None:
    counted, data = Counted(toy.model()), toy.encoded(4)
    with keeping_states(tmp_path):
        with_prefix(counted.model, data, 1, public=BASE)
        with_prefix(counted.model, data, 1, public=b"\0" * 32)
        assert counted.rows == 8
        data.tokens[0, 0] += 1
        with_prefix(counted.model, data, 1, public=BASE)
        assert counted.rows == 9
    with_prefix(counted.model, data, 1, public=BASE)  # outside, nothing is kept
    assert counted.rows == 13


def test_private_records_are_never_kept(toy: Any, tmp_path: Path) -> None:
    model, data = toy.model(), toy.encoded(4)
    with keeping_states(tmp_path):
        with_prefix(model, data, 1)
        with_prefix(model, data, 1, 4, public=BASE)
        assert files(tmp_path) == []
        with_prefix(model, data, 1, public=BASE)
        assert len(files(tmp_path)) == 4  # the control


def test_a_damaged_file_is_made_again(toy: Any, tmp_path: Path) -> None:
    counted, data = Counted(toy.model()), toy.encoded(3)
    with keeping_states(tmp_path):
        right = with_prefix(counted.model, data, 1, public=BASE).prefix
        one, two, _ = files(tmp_path)
        content = bytearray(one.read_bytes())
        content[-1] ^= 1
        one.write_bytes(content)
        two.write_bytes(two.read_bytes()[:-1])
        found = with_prefix(counted.model, data, 1, public=BASE).prefix
        assert counted.rows == 3 + 2
        assert right is not None
        assert found is not None
        torch.testing.assert_close(found, right)
        with_prefix(counted.model, data, 1, public=BASE)
        assert counted.rows == 5


def test_the_directory_stays_within_its_bound(tmp_path: Path) -> None:
    states, size = torch.randn(4, 8), 32 + 4 * 8 * 4
    kept = KeptStates(tmp_path, 10 * size)
    keys = [f"{i:064x}" for i in range(14)]
    for i, key in enumerate(keys[:10]):
        kept.write(key, states)
        os.utime(tmp_path / key[:2] / key, (i, i))
    assert kept.read(keys[0], (4, 8), torch.float32) is not None  # used, so it stays
    for key in keys[10:]:
        kept.write(key, states)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 10 * size
    assert kept.read(keys[0], (4, 8), torch.float32) is not None
    assert kept.read(keys[1], (4, 8), torch.float32) is None
    assert kept.read(keys[-1], (4, 8), torch.float32) is not None
    again = KeptStates(tmp_path, 2 * size)  # a smaller bound holds from the next one on
    again.write("f" * 64, states)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 2 * size


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    """A slip of the pen: ``--states runs``."""
    others = [tmp_path / "quickstart" / "evidence.zip", tmp_path / "ab" / "notes", tmp_path / "x"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10_000))
    (tmp_path / "ab" / ("a" * 64)).mkdir()
    kept = KeptStates(tmp_path, 200)
    for key in ("ab" * 32, "cd" * 32):
        kept.write(key, torch.randn(4, 8))
    assert all(path.stat().st_size == 10_000 for path in others)
    assert kept.read("ab" * 32, (4, 8), torch.float32) is None  # made room for the other
    assert kept.read("cd" * 32, (4, 8), torch.float32) is not None


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StateError, match=r"states cannot be kept there \(File exists\)"),
        keeping_states(tmp_path / "file"),
    ):
        pass
