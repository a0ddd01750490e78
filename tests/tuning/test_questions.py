"""Packed-choice scores equal one forward pass per choice, and bad questions are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from securefedcollm.errors import DataError
from securefedcollm.tuning.frozen import with_prior
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import (
    EncodedQuestions,
    Scoring,
    by_length,
    choice_scores,
    encode,
    shuffled_batches,
)
from tests.support.models import llama, word_level

WORDS = [f"w{i}" for i in range(30)]
VOCABULARY = ["<s>", "</s>", "<unk>", "Answer:", *WORDS]


def small_llama() -> Any:
    return llama(
        len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


def opt() -> Any:
    """Learned positions, counted from 2."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.3,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return OPTForCausalLM(config).eval()


TOKENIZER = word_level(VOCABULARY, bos_token="<s>", eos_token="</s>")
MODELS = {"llama": small_llama(), "gpt2": gpt2(), "opt": opt()}


def one_by_one(model: Any, question: Question) -> list[float]:
    """The definition: a forward pass for every choice, summing its tokens' log-probabilities."""
    prompt = TOKENIZER(question.prompt)["input_ids"]
    scores = []
    for choice in question.choices:
        whole = TOKENIZER(f"{question.prompt} {choice}")["input_ids"]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(
            sum(float(log_probs[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
        )
    return scores


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
questions = st.builds(
    Question,
    prompt=texts,
    choices=st.lists(texts, min_size=1, max_size=4).map(tuple),
    answer=st.just(0),
)


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=25)
@given(st.lists(questions, min_size=1, max_size=5))
def test_packed_scores_equal_one_forward_per_choice(family: str, batch: list[Question]) -> None:
    with torch.no_grad():
        scores = choice_scores(MODELS[family], encode(batch, TOKENIZER, 64))
    for question, row in zip(batch, scores, strict=True):
        count = len(question.choices)
        expected = torch.tensor(one_by_one(MODELS[family], question))
        torch.testing.assert_close(row[:count], expected, atol=2e-4, rtol=1e-5)
        assert bool((row[count:] == -torch.inf).all())


def test_scores_do_not_depend_on_the_batch_or_on_padding() -> None:
    batch = [
        Question("w1 w2", ("w3 w4 w5", "w6"), 0),
        Question("w9", ("w1",), None),
        Question("w1 w2 w3 w4 w5 w6", ("w7 w8", "w9 w9 w9 w9", "w2"), 1),
    ]
    encoded = encode(batch, TOKENIZER, 64)
    with torch.no_grad():
        together = choice_scores(MODELS["llama"], encoded)
        for rows, part in by_length(encoded, 1):
            alone = choice_scores(MODELS["llama"], part)
            torch.testing.assert_close(alone, together[rows], atol=1e-4, rtol=1e-5)
            assert part.tokens.shape[1] == int((part.segments != -1).sum())  # trimmed


def test_rows_of_like_length_come_together_and_every_row_once() -> None:
    words = [1, 7, 2, 6, 1, 5]
    batch = [Question(" ".join(["w1"] * n), ("w2", "w3"), 0) for n in words]
    parts = [(rows.tolist(), part) for rows, part in by_length(encode(batch, TOKENIZER, 64), 2)]
    assert [rows for rows, _ in parts] == [[0, 4], [2, 5], [3, 1]]
    assert [part.tokens.shape[1] for _, part in parts] == [1, 5, 7]


def test_one_token_choices_need_no_mask() -> None:
    """The fast path of the quickstart: a packed row is the bare prompt."""
    encoded = encode([Question("w1 w2 w3", ("w4", "w5"), 0)] * 3, TOKENIZER, 64)
    assert encoded.tokens.shape == (3, 3)
    assert encoded.attention_mask(torch.float32) is None


def test_length_and_pmi_scores() -> None:
    batch = [Question("w1 w2", ("w3 w4", "w5"), 0), Question("w2", ("w6", "w7 w8 w9"), 1)]
    encoded = encode(batch, TOKENIZER, 64)
    model = MODELS["llama"]
    with torch.no_grad():
        plain = choice_scores(model, encoded)
        by_length = choice_scores(model, encoded, Scoring("length"))
        told = with_prior(model, batch, encoded, TOKENIZER)
        pmi = choice_scores(model, told, Scoring("pmi", 4.0))
        per_character = choice_scores(model, told, Scoring("pmi-length"))
    lengths = torch.tensor([[float(len(c)) for c in q.choices] for q in batch])
    torch.testing.assert_close(by_length, plain / lengths)
    prior = torch.tensor([one_by_one(model, Question("Answer:", q.choices, None)) for q in batch])
    torch.testing.assert_close(pmi * 4, plain - prior, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(per_character, pmi * 4 / lengths)
    with pytest.raises(ValueError, match="with_prior"):
        choice_scores(model, encoded, Scoring("pmi"))


def test_a_long_prompt_loses_its_beginning() -> None:
    encoded = encode([Question(" ".join(WORDS), ("w1 w2",), 0)], TOKENIZER, 10)
    assert TOKENIZER.decode(encoded.tokens[0, :8]) == " ".join(WORDS[-8:])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question("w1", (), 0), "question 1: it has no choices"),
        (Question("w1", ("w2",), 1), "question 1: answer 1 is outside its 1 choices"),
        (Question("w1", ("w2",), -1), "question 1: answer -1 is outside"),
        (Question("w1", ("w2", " "), 0), "question 1: its prompt or one of its choices has no"),
        (
            Question("w1", ("w2 " * 9,), 0),
            "question 1: a choice or response has 9 tokens, the limit is 10",
        ),
    ],
)
def test_bad_questions_are_named(question: Question, message: str) -> None:
    good = Question("w1", ("w2", "w3"), None)
    with pytest.raises(DataError, match=message) as caught:
        encode([good, question], TOKENIZER, 10)
    assert caught.value.hint


def test_no_questions() -> None:
    with pytest.raises(DataError, match="no questions"):
        encode([], TOKENIZER, 10)


def test_shuffled_batches_walk_through_every_row_each_epoch() -> None:
    stream = shuffled_batches(10, 3, torch.Generator().manual_seed(5))
    first = torch.cat([next(stream) for _ in range(3)])
    assert len(set(first.tolist())) == 9
    again = shuffled_batches(10, 3, torch.Generator().manual_seed(5))
    assert torch.equal(next(again), first[:3])
    assert len(next(shuffled_batches(2, 5, torch.Generator()))) == 2


def test_rows_survive_selection() -> None:
    batch = [Question(f"w{i} w1", (f"w{i + 1} w2", "w3"), i % 2, group=str(i)) for i in range(4)]
    encoded: EncodedQuestions = encode(batch, TOKENIZER, 64)
    chosen = encoded.select(torch.tensor([3, 1]))
    assert chosen.groups == ("3", "1")
    assert chosen.answers.tolist() == [1, 1]
    assert torch.equal(chosen.tokens[0], encoded.tokens[3])
