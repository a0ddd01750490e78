"""Augmentation: views of a record, whose mean gradient is the record's one gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.privacy.aside import SparingNoise
from securefedcollm.privacy.noise import GridSum, NoiseSource
from securefedcollm.tuning import sounds
from securefedcollm.tuning.adapters import attach, layout_of, select, to_vector
from securefedcollm.tuning.audio_processor import AudioProcessor
from securefedcollm.tuning.classifiers import set_head
from securefedcollm.tuning.independence import made_up_adapter
from securefedcollm.tuning.local import (
    members_of,
    records_of,
    sampled_gradients,
    sum_clipped,
    train_dp,
    train_plain,
)
from securefedcollm.tuning.models import load_model
from securefedcollm.tuning.per_record import question_losses
from securefedcollm.tuning.pictures import pack
from securefedcollm.tuning.plans import Augmentation, LossPlan, Protection, TrainPlan
from securefedcollm.tuning.questions import PLAIN, EncodedQuestions, encode
from securefedcollm.tuning.recipe import evaluation_mode
from securefedcollm.tuning.signals import Signal
from securefedcollm.tuning.views import anew, views_of
from tests.support.pictures import FAMILIES, SIDE, noise, processor, saved
from tests.support.signals import LABELS

HOW = Augmentation(views=3, shift=0.25, flip=True, noise=0.1)
KEY = b"k"
CLIP = 0.01  # far below a gradient's norm: every record is clipped


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = load_model(f"path:{saved(tmp_path_factory.mktemp('m'), FAMILIES['ViT'])}", part="image")
    set_head(found.model, LABELS, 7)
    model = attach(found.model, rank=2, seed=7)
    return model, encode(noise(6, 0), found.tokenizer, 1, "image_classification")


def pictures_of(data: EncodedQuestions, rows: list[int] | range) -> torch.Tensor:
    assert data.signal is not None
    return data.signal.select(torch.tensor(rows)).values


def signal_of(
    values: torch.Tensor, along: tuple[int, ...], lengths: list[int] | None = None
) -> EncodedQuestions:
    """Records without anything but a signal."""
    n = len(values)
    nothing, one = torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1)
    return EncodedQuestions(
        tokens=nothing,
        segments=nothing.to(torch.int8),
        positions=nothing,
        prompt_tokens=nothing[:, 0],
        targets=nothing,
        target_slots=nothing,
        target_choices=nothing,
        choice_mask=one.bool(),
        choice_lengths=one,
        answers=nothing[:, 0],
        groups=("",) * n,
        signal=Signal(
            values,
            torch.ones(1),
            torch.zeros(1),
            along,
            None if lengths is None else torch.tensor(lengths),
        ),
    )


def summed(
    model: Any, data: EncodedQuestions, how: Augmentation | None, members: Any = None
) -> np.ndarray:
    """Σ of clipped gradients of all units, in integers."""
    layout = layout_of(model, "ffa-lora")
    loss = LossPlan(micro_batch=16, augmentation=how)
    records = records_of(model, layout, data, loss, members)
    total = GridSum(layout.size, CLIP, CLIP, 100)
    with evaluation_mode(model):
        sum_clipped(total, records, np.arange(records.units))
    return total.integers.copy()


def test_a_view_follows_from_its_record_and_key_alone(model_and_data: Any) -> None:
    _, data = model_and_data
    among = views_of(data, HOW, KEY)
    alone = views_of(data.select(torch.tensor([4])), HOW, KEY)
    assert torch.equal(pictures_of(among, range(12, 15)), pictures_of(alone, range(3)))
    assert len(among) == 18
    first = pictures_of(alone, range(3))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, pictures_of(anew(alone), range(3)))
    assert not torch.equal(first, pictures_of(views_of(data, HOW, b"other"), range(12, 15)))


def test_a_gradient_is_the_mean_of_the_views(model_and_data: Any) -> None:
    model, data = model_and_data
    layout = layout_of(model, "ffa-lora")
    parameters = select(model, layout)
    records = records_of(model, layout, data, LossPlan(micro_batch=16, augmentation=HOW))
    with made_up_adapter(model, 0.3), evaluation_mode(model):
        (found,) = (np.concatenate(b, axis=1) for b in records.of_units(np.array([2])))
        seen = anew(views_of(data, HOW, b"")).select(torch.arange(6, 9))  # what it drew
        mean = question_losses(model, seen, "answer", PLAIN).mean()
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(mean, parameters)]).numpy()
        plain = question_losses(model, data.select(torch.tensor([2])), "answer", PLAIN).mean()
        other = torch.cat([g.flatten() for g in torch.autograd.grad(plain, parameters)]).numpy()
    assert np.allclose(found[0], wanted, atol=1e-4 * np.abs(wanted).max())
    assert not np.allclose(found[0], other, rtol=0.05)


@pytest.mark.parametrize("subjects", [None, ["a", "b", "a", "c", "b", "a"]])
def test_a_record_contributes_itself_and_at_most_one_clip_norm(
    model_and_data: Any, subjects: list[str] | None
) -> None:
    """To the bit, whoever else is there. Control: views that are clipped one by one."""
    model, data = model_and_data
    with made_up_adapter(model, 0.3):
        if subjects is None:
            parts = [data.select(torch.tensor([i])) for i in range(6)]
            singles = [summed(model, part, HOW) for part in parts]
        else:
            rows = [[i for i, s in enumerate(subjects) if s == name] for name in "abc"]
            parts = [data.select(torch.tensor(r)) for r in rows]
            singles = [summed(model, p, HOW, members_of(len(p), ["x"] * len(p))) for p in parts]
        together = summed(model, data, HOW, members_of(6, subjects))
        views = anew(views_of(data, HOW, b"")).select(torch.arange(3))
        apart = summed(model, views, None)
    assert np.array_equal(together, sum(singles))
    grid = CLIP * 2.0**-46
    norms = [np.linalg.norm(one * grid) for one in singles]
    assert max(norms) <= CLIP * (1 + 1e-9)
    assert min(norms) > 0.99 * CLIP
    assert np.linalg.norm(apart * grid) > 1.5 * CLIP


def test_every_kind_of_tuning_draws_views(model_and_data: Any) -> None:
    model, data = model_and_data
    layout = layout_of(model, "ffa-lora")
    start = [p.detach().clone() for p in select(model, layout)]

    def tuned(how: Augmentation | None, private: bool) -> np.ndarray:
        for parameter, value in zip(select(model, layout), start, strict=True):
            parameter.data.copy_(value)
        loss = LossPlan(micro_batch=4, augmentation=how)
        plan = TrainPlan(steps=3, batch_size=6, learning_rate=0.01, loss=loss)
        if not private:
            return train_plain(model, layout, data, plan, seed=1).delta
        protection = Protection(noise_multiplier=1e-3, clip_norm=1.0)
        return train_dp(model, layout, data, plan, protection, noise=NoiseSource(bytes(32))).delta

    for private in (False, True):
        once = tuned(HOW, private)
        assert np.array_equal(once, tuned(HOW, private))
        assert not np.allclose(once, tuned(None, private), atol=1e-4)
    with made_up_adapter(model, 0.3):
        first, second = (
            sum(sampled_gradients(model, layout, data, loss, q=1.0, noise=NoiseSource()))
            for loss in [LossPlan(micro_batch=4, augmentation=HOW)] * 2
        )
    assert not np.allclose(first, second)  # joint steps draw anew


def test_units_that_are_set_aside_are_not_looked_at(model_and_data: Any) -> None:
    model, data = model_and_data
    loss = LossPlan(micro_batch=4, augmentation=HOW)
    for aside, left in ((np.arange(6) < 4, 2), (np.ones(6, dtype=np.bool_), 0)):
        noise = SparingNoise(aside)
        layout = layout_of(model, "ffa-lora")
        assert len([*sampled_gradients(model, layout, data, loss, q=1.0, noise=noise)]) == left


def test_pictures_move_by_the_shift_at_most_and_repeat_their_edge() -> None:
    values = torch.arange(SIDE * SIDE, dtype=torch.uint8).reshape(1, 1, SIDE, SIDE)
    data = views_of(signal_of(values, (1, 2)), Augmentation(views=200, shift=0.25), KEY)
    found = pictures_of(data, range(200))[:, 0].int()
    corners = {(int(v) // SIDE, int(v) % SIDE) for v in found[:, 3, 3]}
    assert corners == {(3 + down, 3 + right) for down in range(-2, 3) for right in range(-2, 3)}
    moved = next(view for view in found if view[3, 3] == 5 * SIDE + 5)
    assert torch.equal(moved[-3:, 0], torch.tensor([58, 58, 58]))
    assert torch.equal(moved[0, -3:], torch.tensor([23, 23, 23]))


def test_a_small_shift_moves_a_small_picture_by_a_pixel() -> None:
    values = torch.arange(SIDE * SIDE, dtype=torch.uint8).reshape(1, 1, SIDE, SIDE)
    data = views_of(signal_of(values, (1, 2)), Augmentation(views=100, shift=0.01), KEY)
    rows = {int(v) // SIDE for v in pictures_of(data, range(100))[:, 0, 3, 3]}
    assert rows == {2, 3, 4}


def test_half_of_the_views_are_mirrored() -> None:
    values = torch.arange(SIDE * SIDE, dtype=torch.uint8).reshape(1, 1, SIDE, SIDE)
    data = views_of(signal_of(values, (1, 2)), Augmentation(views=200, flip=True), KEY)
    found = pictures_of(data, range(200))
    mirrored = [bool((view == values[0].flip(-1)).all()) for view in found]
    assert 70 < sum(mirrored) < 130
    assert all(
        torch.equal(view, values[0]) for view, m in zip(found, mirrored, strict=True) if not m
    )


@pytest.mark.parametrize(("shape", "along"), [((60,), (0,)), ((50, 8), (0,)), ((8, 50), (1,))])
def test_recordings_move_in_time_alone(shape: tuple[int, ...], along: tuple[int, ...]) -> None:
    """Samples, AST's frames and bins, and Whisper's bins and frames."""
    time = torch.arange(shape[along[0]], dtype=torch.float32)
    band = torch.tensor([[100.0 * b] for b in range(8)])
    values = time if len(shape) == 1 else (band + time if along == (1,) else (band + time).T)
    signal = signal_of(values[None], along, [40])
    data = views_of(signal, Augmentation(views=60, shift=0.1), KEY)
    steps = set()
    for view in pictures_of(data, range(60)):
        middle = (view - values).movedim(along[0], 0)[6:-6]
        (step,) = middle.unique().tolist()  # the same for every time and band
        steps.add(step)
    assert steps == set(range(-4, 5))  # a tenth of its own length


def test_noise_has_its_spread_and_bytes_stay_bytes() -> None:
    grey = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    view = pictures_of(
        views_of(signal_of(grey, (1, 2)), Augmentation(views=1, noise=0.1), KEY), [0]
    )
    assert view.dtype == torch.uint8
    assert float(view.float().std()) == pytest.approx(25.5, rel=0.05)
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    bright = pictures_of(
        views_of(signal_of(white, (1, 2)), Augmentation(views=1, noise=0.1), KEY), [0]
    )
    assert bright.min() > 100  # nothing wraps around
    draw = np.random.default_rng(0)
    waves = torch.zeros(2, 8000)
    waves[:, :5000] = torch.from_numpy(draw.standard_normal((2, 5000)) * [[3], [0.5]]).float()
    data = views_of(signal_of(waves, (0,), [5000] * 2), Augmentation(views=1, noise=0.2), KEY)
    views = pictures_of(data, [0, 1])
    # Silence counts for nothing.
    for view, wave, spread in zip(views, waves, (3, 0.5), strict=True):
        assert float((view - wave).std()) == pytest.approx(0.2 * spread, rel=0.05)


def test_processors_say_along_what_and_how_far_their_records_go() -> None:
    wave = sounds.pack((np.arange(3200) % 100).astype(np.int16))
    for form, along, length in (
        ("samples", (0,), 3200),
        ("kaldi", (0,), 18),
        ("whisper", (1,), 20),
    ):
        signal = AudioProcessor(form, bins=8, frames=50, heard=4800)([wave])
        assert signal.values.shape[1 + along[0]] == (4800 if form == "samples" else 50)
        assert (signal.along, signal.lengths.tolist()) == (along, [length])
        if form != "whisper":  # its silence is not zero
            heard = signal.values[0].reshape(signal.values.shape[1], -1).any(1)
            assert heard[length - 2 : length].any()
            assert not heard[length:].any()
        assert signal.select(torch.tensor([0, 0])).lengths.tolist() == [length] * 2
    picture = processor()([pack(np.zeros((SIDE, SIDE, 3), dtype=np.uint8))])
    assert picture.along == (1, 2)
    assert picture.lengths is None


def test_plain_tuning_takes_the_mean_of_new_views_in_every_step(model_and_data: Any) -> None:
    model, data = model_and_data
    layout = layout_of(model, "ffa-lora")
    start = to_vector(model, layout)
    rate = 0.01
    loss = LossPlan(micro_batch=4, augmentation=HOW)
    plan = TrainPlan(steps=2, batch_size=6, learning_rate=rate, loss=loss, optimizer="sgd")
    with made_up_adapter(model, 0.3), evaluation_mode(model):
        found = train_plain(model, layout, data, plan, seed=1).delta
    seen, expected = views_of(data, HOW, (1).to_bytes(8, "big")), np.zeros_like(start)
    with made_up_adapter(model, 0.3), evaluation_mode(model):
        parameters = select(model, layout)
        for _ in range(2):
            seen = anew(seen)
            batch = seen.select(torch.arange(18))
            mean = question_losses(model, batch, "answer", PLAIN).mean()
            slopes = torch.autograd.grad(mean, parameters)
            with torch.no_grad():
                for parameter, slope in zip(parameters, slopes, strict=True):
                    parameter -= rate * slope
            expected -= rate * torch.cat([slope.flatten() for slope in slopes]).numpy()
    assert np.allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_a_view_that_is_not_finite_makes_its_record_count_as_zero(model_and_data: Any) -> None:
    model, data = model_and_data
    with made_up_adapter(model, 1e30):
        assert not summed(model, data, HOW).any()
    with made_up_adapter(model, 0.3):
        assert summed(model, data, HOW).any()  # the control


def test_views_are_inputs_and_say_nothing_of_their_key(model_and_data: Any) -> None:
    _, data = model_and_data
    signal = views_of(data, HOW, b"secret").signal
    assert "secret" not in repr(signal)
    assert signal is not None
    chosen = signal.select(torch.tensor([4])).inputs(torch.float32)
    assert torch.equal(signal.inputs(torch.float32)[4:5], chosen)
