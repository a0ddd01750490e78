"""No record touches another's gradient, to the bit; padded batches, the control, let it.

Adversary: a server that sends an adapter which amplifies the last bits of floating-point sums until
they are the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from securefedcollm_audits.privacy.coupling import PaddedRecords, hostile_adapters
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.noise import GridSum, NoiseSource
from securefedcollm.privacy.quantise import Quantiser
from securefedcollm.tuning.adapters import (
    attach,
    full_layout,
    layout_of,
    load_vector,
    select,
    to_vector,
)
from securefedcollm.tuning.frozen import with_prefix
from securefedcollm.tuning.head import check_positions
from securefedcollm.tuning.independence import refuse_coupling
from securefedcollm.tuning.kernels import Kernels, Reference
from securefedcollm.tuning.layers import decoder_layers
from securefedcollm.tuning.local import members_of, records_of, sampled_gradients, sum_clipped
from securefedcollm.tuning.packing import row_limit
from securefedcollm.tuning.passes import (
    Shape,
    Widths,
    padded_length,
    passes,
    shapes_of,
    widths_for,
)
from securefedcollm.tuning.per_record import Records, without_broken
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, Scoring, encode
from securefedcollm.tuning.recipe import evaluation_mode
from tests.support.plans import attached

LAYERS, TOP, ADAPTERS, WORST, OTHERS = 4, 2, 40, 2, 24
AMPLIFIED = {"lora": 0.5, "prefix": 0.1, "prompt": 1e-9}
"""Clip norms that padding must cost at the worst of the adapters. Every layer normalises a prompt
before it uses it, so that is a short lever: of 40 none moved more than 7e-7 in float32."""
TWO_THREADS = ("copies", torch.bfloat16, "lora")
SCORED = Scoring("length", 0.5)
LOSS = LossPlan(kind="choices", scoring=SCORED, micro_batch=16)


class Letters:
    """One token a letter; nothing of a tokenizer but what ``encode`` calls."""

    bos_token_id = eos_token_id = None

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + ord(letter) % 60 for letter in text] for text in texts]}


def text(draw: np.random.Generator, least: int, most: int) -> str:
    letters = draw.integers(97, 123, draw.integers(least, most + 1))
    return "".join(chr(letter) for letter in letters)


def questions(kind: str) -> tuple[list[Question], Question]:
    """(others, the one that may be there): mixed lengths and numbers of choices, or copies."""
    draw = np.random.default_rng(5)
    others = [
        Question(
            text(draw, 2, 20),
            tuple(text(draw, 1, 4) for _ in range(draw.integers(1, 4))),
            0,
            subject=f"patient {i // 3}",
        )
        for i in range(OTHERS)
    ]
    if kind == "copies":
        others = [Question("a", ("b", "c"), 1, subject=question.subject) for question in others]
    return others, Question(text(draw, 60, 60), ("some", "two", "x"), 2, subject="new")


def narrow(inner: int) -> Any:
    """A model whose layers are ``inner`` numbers wide inside: no whole number of vectors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=inner,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.1,
        )
        base = LlamaForCausalLM(config).eval()
    return attach(base, method="lora", rank=4, seed=1)


@cache  # tested for independence once
def network(dtype: torch.dtype, method: Any = "lora") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        base = LlamaForCausalLM(config).to(dtype).eval()
    return attached(base, method, rank=4, top_layers=TOP)


def tensors(model: Any, asked: list[Question], prefix: bool, private: bool) -> EncodedQuestions:
    data = encode(asked, Letters(), max_tokens=128)
    return with_prefix(model, data, LAYERS - TOP, 16 if private else None) if prefix else data


def hostile(model: Any) -> list[np.ndarray]:
    layout = full_layout(model)
    draw = np.random.default_rng(11)
    return list(hostile_adapters(to_vector(model, layout), layout, ADAPTERS, None, draw))


def padded(model: Any, data: EncodedQuestions, loss: Any) -> np.ndarray:
    """Clipped gradients, [n, d], from one batch as long as its longest record."""
    records = PaddedRecords(
        model,
        select(model, full_layout(model)),
        data,
        loss=loss,
        scoring=SCORED,
        widths=Widths(tokens=1, most=len(data)),
    )
    with evaluation_mode(model):
        ((rows, found),) = records.of_records(np.arange(len(data)))
    blocks, norms = without_broken([g.flatten(1).double().numpy() for g in found])
    clipped = np.concatenate(blocks, 1) * np.minimum(1.0, 1.0 / np.maximum(norms, 1e-300))[:, None]
    return clipped[np.argsort(rows)]


def isolated(model: Any, data: EncodedQuestions, loss: Any, micro_batch: int = 16) -> list[bytes]:
    """Bits of every record's gradient by the product's own path."""
    plan = LossPlan(kind=loss, scoring=SCORED, micro_batch=micro_batch)
    records = records_of(model, full_layout(model), data, plan)
    with evaluation_mode(model):
        return every(records, len(data))


def every(records: Records, count: int) -> list[bytes]:
    found: dict[int, bytes] = {}
    for rows, gradients in records.of_records(np.arange(count)):
        for at, row in enumerate(rows.tolist()):
            found[row] = b"".join(g[at].numpy().tobytes() for g in gradients)
    return [found[row] for row in range(count)]


@pytest.fixture
def threads(kind: str, dtype: torch.dtype, method: str) -> Iterator[None]:
    """`make test` gives every process one thread; kernels divide their work among two as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if (kind, dtype, method) == TWO_THREADS else before)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", [pytest.param("mixed", marks=pytest.mark.soak), "copies"])
@pytest.mark.parametrize(
    ("dtype", "method", "prefix", "loss"),
    [
        (torch.float32, "lora", False, "choices"),
        pytest.param(torch.float32, "lora", True, "answer", marks=pytest.mark.soak),
        pytest.param(torch.float32, "prompt", False, "choices", marks=pytest.mark.soak),
        pytest.param(torch.float32, "prefix", False, "answer", marks=pytest.mark.soak),
        pytest.param(torch.bfloat16, "lora", False, "choices", marks=pytest.mark.soak),
        pytest.param(torch.bfloat16, "lora", True, "answer", marks=pytest.mark.soak),
        pytest.param(torch.bfloat16, "prompt", False, "choices", marks=pytest.mark.soak),
        pytest.param(torch.bfloat16, "prefix", False, "answer", marks=pytest.mark.soak),
    ],
)
def test_a_hostile_adapter_finds_no_record_in_the_others_bits(
    dtype: torch.dtype, method: Any, prefix: bool, kind: str, loss: Any
) -> None:
    model = network(dtype, method)
    layout = full_layout(model)
    others, added = questions(kind)
    order = np.random.default_rng(2).permutation(OTHERS).tolist()
    sets = {
        "without": others,
        "with": [*others, added],
        "first": [added, *others],
        "reordered": [others[i] for i in order],
        "few": others[:7],
    }
    data = {name: tensors(model, asked, prefix, private=True) for name, asked in sets.items()}
    together, apart = (
        tensors(model, asked, prefix, private=False) for asked in ([*others, added], others)
    )

    def control(adapter: np.ndarray) -> float:
        load_vector(model, layout, adapter)
        change = padded(model, together, loss)[:OTHERS] - padded(model, apart, loss)
        return float(np.linalg.norm(change.sum(0)))

    moved = sorted(((control(adapter), i, adapter) for i, adapter in enumerate(hostile(model))))
    assert moved[-1][0] > AMPLIFIED[method]
    for _, _, adapter in moved[-WORST:]:
        load_vector(model, layout, adapter)
        found = {name: isolated(model, encoded, loss) for name, encoded in data.items()}
        assert found["with"][:OTHERS] == found["without"]
        assert found["first"][1:] == found["without"]
        assert found["reordered"] == [found["without"][i] for i in order]
        assert found["few"] == found["without"][:7]
        assert found["first"][0] == found["with"][-1]
        distinct = len(set(found["without"]))
        assert distinct == 1 if kind == "copies" else distinct > OTHERS // 2


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("kind", [pytest.param("mixed", marks=pytest.mark.soak), "copies"])
def test_a_subject_moves_the_sum_by_its_own_integers_and_no_more(kind: str, method: Any) -> None:
    """Local sums and joint ones: S(D + x) = S(D) + S(x) exactly, for all records x of a person."""
    model = network(torch.float32, method)
    layout = full_layout(model)
    others, added = questions(kind)
    person = [added, replace(added, prompt="much shorter"), replace(others[3], subject="new")]
    quantiser = Quantiser(layout.size, 1.0, 2**20)

    def sums(asked: list[Question]) -> tuple[np.ndarray, np.ndarray]:
        subjects = [str(question.subject) for question in asked]
        data = tensors(model, asked, prefix=False, private=True)
        members = members_of(len(data), subjects)
        records = records_of(model, layout, data, LOSS, members)
        total = GridSum(layout.size, 1.0, 1.0, len(data))
        with evaluation_mode(model):
            sum_clipped(total, records, np.arange(records.units))
        joint = sampled_gradients(
            model, layout, data, LOSS, q=1.0, noise=NoiseSource(), subjects=subjects
        )
        return total.integers.copy(), quantiser.encode_sum(joint)

    moved = []
    honest = np.random.default_rng(8).normal(scale=0.1, size=layout.size)
    for adapter in (honest, *hostile(model)[:5]):
        load_vector(model, layout, adapter)
        mixed = [person[0], *others[:9], person[1], *others[9:], person[2]]
        for together, apart, own in zip(sums(mixed), sums(others), sums(person), strict=True):
            np.testing.assert_array_equal(together - own, apart)
            moved.append(own.any() and apart.any())  # some adapters leave no finite gradient
        assert np.linalg.norm(own) <= quantiser.bound
    assert moved[0]


def crooked(by: str) -> Any:
    """A hook: the last bits of a layer depend on a record's row, or on who else is there."""

    def bend(layer: nn.Module, given: Any, states: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(states)).view(-1, 1, 1).float()
        if by == "company":
            rows = 1e3 * states.detach().mean().expand_as(rows)
        elif by == "largest number":
            rows = 1e3 * states.detach().amax((0, 2), keepdim=True)  # of every position
        elif by == "branch":
            rows = rows * 0 + float(states.detach()[:, 0].amax())
        elif by == "number of rows":
            rows = torch.full_like(rows, float(len(states) >= 8))
        return states * (1 + 1e-6 * rows)

    return bend


@pytest.mark.parametrize(
    ("by", "method"),
    [
        ("branch", "lora"),
        *(
            pytest.param(by, "lora", marks=pytest.mark.soak)
            for by in ("place", "company", "largest number", "number of rows")
        ),
        pytest.param("place", "prompt", marks=pytest.mark.soak),
        pytest.param("company", "prefix", marks=pytest.mark.soak),
    ],
)
def test_kernels_that_look_at_other_rows_are_found_and_their_records_go_alone(
    by: str, method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Adversary: nobody; a processor or library whose sums depend on where a row stands."""
    model = network.__wrapped__(torch.float32, method)
    layout = full_layout(model)
    layer = decoder_layers(model.get_base_model())[-1]
    layer.mlp.register_forward_hook(crooked(by))
    others, added = questions("mixed")
    load_vector(model, layout, hostile(model)[0])
    without = isolated(model, tensors(model, others, False, private=True), "choices")
    found = isolated(model, tensors(model, [added, *others], False, private=True), "choices")
    assert found[1:] == without
    alone = "are taken one at a time" in caplog.text
    # Passes of fewer than eight rows are simply not used where all of the others agree.
    assert alone == (by != "number of rows")


@pytest.mark.parametrize(
    ("inner", "micro_batch", "sizes", "alone"),
    [(44, 16, (1, 16), False), (44, 2, (2,), True)],
    ids=["fewer rows", "last row"],
)
def test_numbers_that_a_kernel_has_left_over_do_not_betray_who_is_last(
    inner: int,
    micro_batch: int,
    sizes: tuple[int, ...],
    alone: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A vectorised ``silu`` computes the last numbers of a tensor by other instructions, and a few
    of them differ: too few for a comparison of made-up rows, enough for an adapter from a server
    that looks for them. Without the rule on remainders, the control, it finds them."""
    model = narrow(inner)
    layout = layout_of(model, "lora")
    data = encode([Question("abc", ("de", "fg"), 1)] * 2, Letters(), max_tokens=8)
    (shape, _) = shapes_of(data, Widths(tokens=10_000, most=micro_batch))
    unsafe = Widths(tokens=10_000, most=micro_batch, sizes={shape: sizes})

    def gradients(rows: list[int], widths: Widths | None) -> set[bytes]:
        part = data.select(torch.tensor(rows))
        if widths is None:
            return set(isolated(model, part, "answer", micro_batch))
        given = (model, select(model, layout), part)
        return set(every(Records(*given, loss="answer", scoring=SCORED, widths=widths), len(part)))

    betrayed = 0
    draw = np.random.default_rng(11)
    start = to_vector(model, layout)
    with evaluation_mode(model):
        for adapter in hostile_adapters(start, layout, ADAPTERS, None, draw):
            load_vector(model, layout, adapter)
            betrayed += len(gradients([0], unsafe) | gradients([0, 1], unsafe)) > 1
            assert len(gradients([0], None) | gradients([0, 1], None)) == 1
    assert betrayed
    assert ("are taken one at a time" in caplog.text) == alone


@pytest.mark.soak
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_model_of_coarse_numbers_has_passes_of_one_size(dtype: torch.dtype, sizes: bool) -> None:
    """Adversary: a server that searches. In bfloat16, on a processor with instructions for it, a
    product of few rows and one of many differ in one number of a hundred thousand; the comparison
    saw none of them, and a search moved a record by half the clip norm."""
    model = network.__wrapped__(dtype)
    data = tensors(model, questions("mixed")[0], False, private=True)
    found = records_of(model, layout_of(model, "lora"), data, LOSS)._widths.sizes
    assert found
    assert any(len(allowed) > 1 for allowed in found.values()) == sizes


leaning_by: list[Callable[[torch.Tensor], torch.Tensor]] = []


@torch.library.custom_op("securefedcollm_tests::lean", mutates_args=())
def lean(rows: torch.Tensor) -> torch.Tensor:
    """A kernel that treats one number in a hundred otherwise, if ``leaning_by`` says so."""
    (how,) = leaning_by
    few = torch.zeros_like(rows)
    few[:, 3] = rows[:, 3] * 2e-7 * (rows[:, 4] > 1.0)
    return rows + few * how(rows)


@pytest.mark.parametrize(
    ("how", "found"),
    [
        (lambda rows: torch.zeros(()), False),
        (lambda rows: torch.ones(()), False),  # alike in all rows
        (lambda rows: torch.arange(len(rows))[:, None] % 4 == 3, True),
        (lambda rows: rows.mean() > 0, True),
        (lambda rows: torch.tensor(len(rows) == 4), True),
    ],
    ids=["right", "wrong alike", "by place", "by company", "by number"],
)
def test_a_kernel_that_treats_few_numbers_otherwise_is_found(how: Any, found: bool) -> None:
    """Too few for a comparison of what a whole pass says, which is the control here."""
    leaning_by[:] = [how]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(16, 16)
    rows = torch.randn(16, generator=torch.Generator().manual_seed(3)).repeat(16, 1)
    reference: Reference = {}
    named: set[str] = set()
    for count in (16, 4):
        kernels = Kernels(layer, count, 32, 1, reference)
        with torch.no_grad(), kernels:
            says = lean(layer(rows[:count]))
        assert (says == says[0]).all()
        named |= kernels.coupling
    assert named == ({"lean"} if found else set())


def test_a_model_that_remembers_a_record_is_refused() -> None:
    model = network.__wrapped__(torch.float32)
    row_limit(model)  # before it remembers anything: another test would refuse it
    rotary = model.get_base_model().model.rotary_emb

    def grow(*unused: Any) -> None:
        rotary.inv_freq.mul_(1.001)

    rotary.register_forward_hook(grow)
    others, _ = questions("mixed")
    with pytest.raises(ConfigError, match=r"a pass changes its buffer .*inv_freq"):
        isolated(model, tensors(model, others, False, private=True), "choices")


class Refusable(nn.Module):
    def __init__(self, layer: nn.Module | None = None, **config: Any) -> None:
        super().__init__()
        self.layer = layer or nn.Identity()
        self.config = LlamaConfig(**config)


GROWING = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Refusable(nn.BatchNorm1d(4)), "its layer layer is a batch normalisation"),
        (Refusable(nn.SyncBatchNorm(4)), "its layer layer is a batch normalisation"),
        (Refusable(expert_capacity=4), "experts have a capacity"),
        (
            Refusable(max_position_embeddings=64, rope_parameters=GROWING),
            r"rotary scaling \(dynamic\) follows the longest record beyond 64 tokens",
        ),
    ],
)
def test_models_that_couple_rows_on_purpose_are_refused_by_name(model: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        refuse_coupling(model, "models.slm", 65)
    assert caught.value.where == "models.slm"


def test_more_tokens_than_a_table_of_positions_holds_are_refused_before_any_is_sampled() -> None:
    """Adversary: a server that sees a silo fail in the very step that samples a long record."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    check_positions(model, 32, "path:slm")
    with pytest.raises(ConfigError, match=r"task.max_tokens: 33 tokens, the model .* for 32"):
        check_positions(model, 33, "path:slm")


def test_short_records_never_reach_a_growing_rotary_scaling() -> None:
    model = Refusable(max_position_embeddings=64, rope_parameters=GROWING)
    refuse_coupling(model, "models.slm", 64)
    refuse_coupling(Refusable(), "models.slm", 10**6)


def test_routed_experts_see_one_record_at_a_time() -> None:
    model = network(torch.float32)
    assert widths_for(model, 64).rows(Shape(8, 2)) > 1
    model.get_base_model().config.num_local_experts = 8
    try:
        widths = widths_for(model, 64)
    finally:
        del model.get_base_model().config.num_local_experts
    assert widths.apart(Shape(8, 2))
    assert widths.rows(Shape(8, 2)) == 1


def test_a_fixed_pass_always_has_a_mask() -> None:
    """Without one, transformers looks for packed sequences in the positions of *all* rows, and
    picks a kernel by what it finds: a single padded row would change the others' sums."""
    data = encode([Question("", ("abcdefg",), 0)] * 3, Letters(), max_tokens=16, kind="text")
    assert data.attention_mask(torch.float32) is None
    widths = Widths(tokens=64, most=4)
    (one,) = passes(data, shapes_of(data, widths), np.arange(3), widths)
    mask = one.batch.attention_mask(torch.float32)
    assert mask is not None
    assert mask.shape == (4, 1, 6, 6)  # three records and a dummy


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 17, 33, 100, 1000])
def test_a_shape_wastes_little(tokens: int) -> None:
    padded = padded_length(tokens)
    assert tokens <= padded <= max(1.25 * tokens, tokens + 1)
    assert padded_length(padded) == padded


def test_a_record_that_goes_alone_is_not_padded() -> None:
    asked = [Question("a" * n, ("bc",), 0) for n in (3, 9, 17, 33)]  # 5, 11, 19 and 35 tokens
    data = encode(asked, Letters(), max_tokens=64)
    for widths, lengths in (
        (Widths(tokens=22, most=4), [5, 12, 19, 35]),
        (Widths(tokens=22, most=1), [5, 11, 19, 35]),
    ):
        shapes = shapes_of(data, widths)
        assert [shape.length for shape in shapes] == lengths
        for one in passes(data, shapes, np.arange(4), widths):
            assert widths.wide(one.shape) == (len(one.batch) > 1)
            assert one.batch.tokens.shape[1] == one.shape.length
