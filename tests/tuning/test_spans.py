"""Two tokenizers, trained here: alignment, events, losses against float64, and what crosses."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import attach, layout_of, load_vector, select
from securefedcollm.tuning.distil import DistilStep, distil
from securefedcollm.tuning.plans import DistilLossPlan, DistilPlan
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, encode
from securefedcollm.tuning.spans import SpanObjective, aligned
from securefedcollm.tuning.token_distil import TokenObjective
from securefedcollm.tuning.tokenise import Piece, tokenise
from securefedcollm.tuning.vocabulary import Vocabulary, shared_tokens, vocabulary_of
from tests.support.models import byte_level, sentence_piece

TAU, WEIGHT, SHARP = 1.3, 0.6, 3.0
TEXTS = ["the newspaper said things today", "a naïve café", "über things about a newspaper 東 x"]


@pytest.fixture(scope="module")
def two() -> tuple[Any, Any]:
    return sentence_piece(), byte_level()


def llm_and_slm(two: tuple[Any, Any]) -> tuple[Any, Any]:
    """A small Llama and a smaller GPT-2 with adapters that say something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(two[0]),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.2,
            )
        )
        gpt = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(two[1]),
                n_embd=48,
                n_layer=2,
                n_head=2,
                n_positions=64,
                bos_token_id=0,
                eos_token_id=0,
                initializer_range=0.3,
                attn_pdrop=0,
                embd_pdrop=0,
                resid_pdrop=0,
            )
        )
    out = []
    for i, base in enumerate((llama, gpt)):
        model = attach(base.eval(), seed=1)
        layout = layout_of(model, "ffa-lora")
        load_vector(model, layout, np.random.default_rng(i).normal(scale=0.1, size=layout.size))
        out.append(model)
    return out[0], out[1]


def encoded(two: tuple[Any, Any], labelled: int = 2) -> tuple[EncodedQuestions, EncodedQuestions]:
    questions = [Question("", (text,), 0 if i < labelled else None) for i, text in enumerate(TEXTS)]
    return tuple(encode(questions, t, 64, "text", cuts=True) for t in two)  # type: ignore[return-value]


def vocabularies(two: tuple[Any, Any]) -> tuple[Vocabulary, Vocabulary]:
    return vocabulary_of(two[0]), vocabulary_of(two[1])


def text_of(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    return b"".join(vocabulary[i] or b"" for i in ids)


ALPHABET = "ab eé東🙂-newspaperthings"


@settings(max_examples=60)
@given(st.text(ALPHABET, min_size=1, max_size=30).map(lambda t: " ".join(t.split())))
def test_spans_hold_the_same_text_on_both_sides(two: tuple[Any, Any], text: str) -> None:
    if not text:
        return
    sides = [tokenise([Question("", (text,), 0)], t, 256, "text", cuts=True)[0][1][0] for t in two]
    known = vocabularies(two)
    spans = aligned(*sides, follows=True)
    assert spans
    joined = b""
    for taken in spans:
        one, other = (
            text_of(known[s], sides[s].ids[where]).strip() for s, where in enumerate(taken)
        )
        assert one == other
        joined += one
    assert joined == text.replace(" ", "").encode()


def test_cuts_that_only_one_side_has_end_no_span() -> None:
    one = Piece([1, 2, 3, 4], [2, 5, 9, -1])
    two = Piece([1, 2, 3], [1, 5, 9])
    assert aligned(one, two, follows=True) == [
        (slice(0, 2), slice(0, 2)),
        (slice(2, 3), slice(2, 3)),
    ]
    assert aligned(one, two, follows=False) == [(slice(2, 3), slice(2, 3))]
    assert aligned(one, Piece([7], [3]), follows=True) == []


def test_what_vocabularies_share(two: tuple[Any, Any]) -> None:
    one, other = vocabularies(two)
    mine, theirs = shared_tokens(one, other)
    assert len(mine) > 256  # the bytes, and words
    assert [one[i] for i in mine] == [other[i] for i in theirs]
    assert b" things" in {one[i] for i in mine}
    assert len(set(mine)) == len(mine)
    assert len(set(theirs)) == len(theirs)
    assert {i for i, value in enumerate(one) if value is None} == {0, 1, 2}
    word = Tokenizer(models.WordLevel({"[UNK]": 0, "new": 1, "##ly": 2}, "[UNK]"))
    plain = PreTrainedTokenizerFast(tokenizer_object=word, unk_token="[UNK]")
    assert vocabulary_of(plain) == (None, b" new", b"ly")


def objective(two: Any, models: Any, data: Any, **options: Any) -> SpanObjective:
    settings: dict[str, Any] = {
        "over": "answer",
        "sharpness": SHARP,
        "weight": WEIGHT,
        "temperature": TAU,
        "micro_batch": 2,
        **options,
    }
    return SpanObjective(models, data, vocabularies(two), DistilLossPlan(**settings))


def events_by_hand(
    model: Any,
    data: EncodedQuestions,
    row: int,
    span: slice,
    known: Vocabulary,
    names: list[bytes],
    whole: set[bytes],
) -> Tensor:
    """The definition, token by token: [span, shared tokens less the span, all else]."""
    prompt = data.tokens[row, : data.prompt_tokens[row]].tolist()
    follows = data.targets[row][data.target_choices[row] == 0].tolist()
    logits = model(torch.tensor([prompt + follows])).logits[0] / TAU
    said = logits.softmax(-1)[len(prompt) - 1 :]
    whole_of = torch.ones((), dtype=said.dtype)
    for j in range(span.start, span.stop):
        whole_of = whole_of * said[j, follows[j]]
    left = {i: said[span.start, i] for i in range(said.shape[1])}
    left[follows[span.start]] = left[follows[span.start]] - whole_of
    tokens = {value: i for i, value in reversed(list(enumerate(known))) if value is not None}
    shared = [left.pop(tokens[name]) for name in names]
    for i, name in enumerate(names):
        if name in whole:
            whole_of = whole_of + shared[i]
            shared[i] = torch.zeros_like(whole_of)
    return torch.stack([whole_of, *shared, torch.stack(list(left.values())).sum()])


def by_hand(
    models: Any, data: Any, two: Any, loss: str, direction: str
) -> tuple[list[Tensor], int]:
    """(LLM, SLM) loss in float64, and the number of spans."""
    known = vocabularies(two)
    ids, _ = shared_tokens(*known)
    names = [known[0][i] for i in ids]
    spans: list[tuple[int, list[Tensor]]] = []
    ce = [torch.zeros((), dtype=torch.float64) for _ in models]
    for row in range(len(TEXTS)):
        pieces = [questions.pieces[row][1][0] for questions in data]
        for taken in aligned(*pieces, follows=True):
            used = [[known[s][i] for i in pieces[s].ids[taken[s]]] for s in (0, 1)]
            whole = {u[0] for u in used if len(u) == 1} & set(names)
            events = [
                events_by_hand(models[s], data[s], row, taken[s], known[s], names, whole)
                for s in (0, 1)
            ]
            spans.append((row, events))
        if int(data[0].answers[row]) >= 0:
            for s in (0, 1):
                prompt = data[s].tokens[row, : data[s].prompt_tokens[row]].tolist()
                follows = data[s].targets[row][data[s].target_choices[row] == 0].tolist()
                logs = models[s](torch.tensor([prompt + follows])).logits[0].log_softmax(-1)
                for j, token in enumerate(follows):
                    ce[s] = ce[s] - logs[len(prompt) - 1 + j, token]
    labels = [
        sum(
            int((q.target_choices[r] == 0).sum())
            for r in range(len(TEXTS))
            if int(q.answers[r]) >= 0
        )
        for q in data
    ]
    out = []
    for own in (0, 1):
        total = ce[own] / labels[own]
        for row, events in spans:
            p = [e.detach() for e in events]
            h = [-torch.xlogy(x, x.clamp_min(1e-300)).sum() for x in p]
            if loss == "mutual-kl":
                teacher = p[1 - own]
            elif loss == "entropy-pooled":
                w = torch.sigmoid(SHARP * (h[1] - h[0]))
                teacher = w * p[0] + (1 - w) * p[1]
            else:
                here = [e for r, e in spans if r == row]
                labelled = int(data[0].answers[row]) >= 0
                wrong = [
                    sum(
                        -e[s][0].detach().log()
                        if labelled
                        else -torch.xlogy(e[s], e[s].clamp_min(1e-300)).sum().detach()
                        for e in here
                    )
                    for s in (0, 1)
                ]
                teacher = p[0] if wrong[0] <= wrong[1] else p[1]
            q = events[own].clamp_min(1e-12)
            teacher = teacher.clamp_min(1e-12)
            if direction == "forward":
                apart = (teacher * (teacher / q).log()).sum()
            else:
                m = (teacher + q) / 2
                apart = ((teacher * (teacher / m).log()).sum() + (q * (q / m).log()).sum()) / 2
            total = total + WEIGHT * TAU**2 * apart / len(spans)
        out.append(total)
    return out, len(spans)


@pytest.mark.parametrize(
    ("loss", "direction"),
    [("entropy-pooled", "forward"), ("mutual-kl", "js"), ("dual-min-ce", "forward")],
)
def test_losses_and_gradients_are_the_written_out_ones(
    two: tuple[Any, Any], loss: str, direction: str
) -> None:
    models, data = llm_and_slm(two), encoded(two)
    doubles = [copy.deepcopy(model).double() for model in models]
    expected, spans = by_hand(doubles, data, two, loss, direction)
    assert spans > 12
    rows = torch.arange(len(TEXTS))
    goal = objective(two, models, data, kind=loss, direction=direction)
    totals = [0.0, 0.0]
    for part in torch.split(rows, 2):
        for i, term in enumerate(goal.terms(rows, part)):
            term.backward()
            totals[i] += term.item()
    assert totals == pytest.approx([value.item() for value in expected], rel=1e-4)
    for model, double, value in zip(models, doubles, expected, strict=True):
        layout = layout_of(model, "ffa-lora")
        slope = torch.autograd.grad(value, select(double, layout))
        got = torch.cat([p.grad.flatten() for p in select(model, layout)])
        want = torch.cat([g.flatten() for g in slope])
        assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("loss", ["entropy-pooled", "dual-min-ce", "mutual-kl"])
@pytest.mark.parametrize("over", ["answer", "all"])
def test_equal_tokenizers_give_the_losses_of_one_tokenizer(
    two: tuple[Any, Any], loss: str, over: Any
) -> None:
    """Where every token is shared or alone in its vocabulary, spans are tokens."""
    slm = two[1]
    config: dict[str, Any] = {"vocab_size": len(slm), "n_layer": 1, "n_head": 1, "n_positions": 64}
    config |= {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        models = [
            attach(GPT2LMHeadModel(GPT2Config(n_embd=width, **config)).eval(), seed=1)
            for width in (24, 16)
        ]
    asked = [Question("a new", (t, "x"), 0) for t in (TEXTS[0], "cool paper", "things")]
    data = encode(asked, slm, 64, cuts=True)
    rows = torch.arange(3)
    plan = DistilLossPlan(kind=loss, over=over, sharpness=SHARP, temperature=TAU, micro_batch=2)
    known = vocabulary_of(slm)

    def apart(make: Any, *more: Any) -> list[float]:
        """The divergence alone: what weight 1 has more than weight 0."""
        both = [
            make(models, (data, data), *more, replace(plan, weight=w)).terms(rows, rows)
            for w in (1.0, 1e-9)
        ]
        return [a.item() - b.item() for a, b in zip(*both, strict=True)]

    spans = apart(SpanObjective, (known, known))
    assert spans == pytest.approx(apart(TokenObjective), rel=1e-3, abs=1e-5)
    assert max(spans) > 0.1


@pytest.mark.parametrize("kind", ["entropy-pooled", "dual-min-ce", "mutual-kl", "none"])
def test_who_does_not_learn_is_only_asked(two: tuple[Any, Any], kind: Any) -> None:
    models, data, rows = llm_and_slm(two), encoded(two), torch.arange(len(TEXTS))
    plan = DistilLossPlan(kind=kind, over="answer")
    both = SpanObjective(models, data, vocabularies(two), plan).terms(rows, rows)
    for learns in ((True, False), (False, True)):
        terms = SpanObjective(models, data, vocabularies(two), plan, learns).terms(rows, rows)
        assert [term.requires_grad for term in terms] == list(learns)
        expected = [t.item() * own for t, own in zip(both, learns, strict=True)]
        assert [term.item() for term in terms] == expected


def test_knowledge_crosses_between_tokenizers(two: tuple[Any, Any]) -> None:
    """On text without labels a GPT-2 comes to say what a Llama says, span by span."""
    models, data = llm_and_slm(two), encoded(two, labelled=0)
    before = objective(two, models, data, kind="mutual-kl", temperature=1.0)
    rows = torch.arange(len(TEXTS))
    apart = before.terms(rows, rows)[1].item()
    steps: list[DistilStep] = []
    layouts = [layout_of(model, "ffa-lora") for model in models]
    plan = DistilPlan(
        steps=80,
        batch_labelled=0,
        batch_unlabelled=3,
        learning_rate_llm=1e-12,
        learning_rate_slm=5e-2,
        loss=DistilLossPlan(kind="mutual-kl", over="answer"),
    )
    known = vocabularies(two)
    distil(models, layouts, data, plan, seed=0, vocabularies=known, on_step=steps.append)
    after = objective(two, models, data, kind="mutual-kl", temperature=1.0)
    assert after.terms(rows, rows)[1].item() < apart / 2
    assert steps[-1].loss_slm < steps[0].loss_slm / 1.5


def test_refusals(two: tuple[Any, Any]) -> None:
    models, data = llm_and_slm(two), encoded(two)
    layouts = [layout_of(model, "ffa-lora") for model in models]
    plan = DistilPlan(
        steps=1,
        batch_labelled=1,
        batch_unlabelled=1,
        learning_rate_llm=1e-3,
        learning_rate_slm=1e-3,
        loss=DistilLossPlan(over="answer", top_k=4),
    )
    with pytest.raises(ConfigError, match=r"distillation.top_k: the two models have different"):
        distil(models, layouts, data, plan, seed=0, vocabularies=vocabularies(two))
    blind = [
        [(prompt, [Piece(c.ids, [-1] * len(c.ids), -7) for c in cs]) for prompt, cs in q.pieces]
        for q in data
    ]
    blind[0] = [(p, [c._replace(start=3) for c in cs]) for p, cs in blind[0]]
    cut = [replace(q, pieces=tuple(rows)) for q, rows in zip(data, blind, strict=True)]
    with pytest.raises(ConfigError, match="cut no public text at a common place"):
        objective(two, models, cut)
    head = attach(models[0].unload(), targets=["lm_head"], seed=1)
    with pytest.raises(ConfigError, match=r"adapter.targets: an adapter on the output layer"):
        objective(two, (head, models[1]), data)

    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="does not report where its tokens are"):
        tokenise([Question("", ("a b",), 0)], Slow(), 8, "text", cuts=True)
