"""Responses, texts and labels: what is read, how it becomes tokens, per-record gradients."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.errors import ConfigError, DataError
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.tuning.adapters import attach, layout_of, load_vector, select
from securefedcollm.tuning.data import read_questions, write_questions
from securefedcollm.tuning.evaluate import evaluate
from securefedcollm.tuning.local import sampled_gradients, train_dp
from securefedcollm.tuning.per_record import per_record_gradients, question_losses, watched
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import PLAIN, EncodedQuestions, choice_scores, encode
from securefedcollm.tuning.splits import SplitPlan, split_questions
from securefedcollm.tuning.token_distil import positions_of
from tests.support.models import word_level
from tests.support.plans import protection, train_plan

LABELS = ["negative", "positive"]
WORDS = ["Instruction:", "Response:", "Text:", "Label:", "[u]", "[a]", "[/]", *LABELS]
WORDS += [f"w{i}" for i in range(9)]
TEMPLATE = (
    "{% for m in messages %}{{ '[u] ' if m.role == 'user' else '[a] ' }}{{ m.content }} [/] "
    "{% endfor %}{% if add_generation_prompt %}[a] {% endif %}"
)


def tokenizer(template: str | None = None, **special: str) -> Any:
    made = word_level(["<s>", "<unk>", *WORDS], **special)
    made.chat_template = template
    return made


def words(ids: list[int]) -> str:
    return " ".join((["<s>", "<unk>", *WORDS])[i] for i in ids)


def rows_of(data: EncodedQuestions) -> list[tuple[str, str]]:
    """(prompt, everything to predict after it) of every row."""
    out = []
    for i in range(len(data)):
        real = data.target_choices[i] < data.choice_mask.shape[1]
        prompt = data.tokens[i, : data.prompt_tokens[i]].tolist()
        out.append((words(prompt), words(data.targets[i][real].tolist())))
    return out


RESPONSES = [
    Question("w1 w2", ("w3 w4 w5",), 0, "even"),
    Question("w6", ("w7",), 0, "odd"),
    Question("w8 w1 w3", ("w2 w2",), 0, "even"),
]
TEXTS = [
    Question("", ("w1 w2 w3 w4 w5 w6",), 0),
    Question("", ("w7 w8",), 0),
    Question("", ("w3 w1 w2 w2",), 0),
]
LABELLED = [Question(f"Text: w{i} w3\nLabel:", tuple(LABELS), i % 2) for i in range(4)]


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_each_kind_of_file_is_read(tmp_path: Path) -> None:
    asked = write(tmp_path / "a.jsonl", {"instruction": " do ", "response": "done", "who": 3})
    assert read_questions(asked, kind="instruction", owner="who") == [
        Question("do", ("done",), 0, "", "3")
    ]
    bare = write(tmp_path / "b.jsonl", {"instruction": "do"})
    assert read_questions(bare, kind="instruction", labelled=False) == [Question("do", (), None)]
    texts = write(tmp_path / "t.csv", "text,subject", '"one, two",news')
    assert read_questions(texts, kind="text") == [Question("", ("one, two",), 0, "news")]
    judged = write(tmp_path / "c.csv", "text,label", "good,positive", "bad,0")
    found = read_questions(judged, kind="classification", labels=LABELS)
    assert [q.answer for q in found] == [1, 0]
    assert found[0].prompt == "Text: good\nLabel:"
    assert found[0].choices == tuple(LABELS)


@pytest.mark.parametrize("kind", ["multiple_choice", "classification", "instruction", "text"])
def test_what_is_written_is_read_back(tmp_path: Path, kind: Any) -> None:
    rows = {
        "multiple_choice": [
            Question("a", ("b", "c"), 1, "g", "7"),
            Question("d", ("e", "f"), None),
        ],
        "classification": [Question("Text: x\nLabel:", tuple(LABELS), 0), LABELLED[1].unlabelled()],
        "instruction": [RESPONSES[0], RESPONSES[1].unlabelled()],
        "text": [TEXTS[0], TEXTS[1].unlabelled()],
    }[kind]
    owned = [q if q.subject else replace(q, subject="8") for q in rows]
    write_questions(tmp_path / "rows.jsonl", owned, "who", kind)
    options: dict[str, Any] = {"kind": kind, "labels": LABELS, "labelled": False, "owner": "who"}
    assert read_questions(tmp_path / "rows.jsonl", **options) == owned
    assert rows[1].answer is None


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("instruction", {"instruction": "x"}, "field 'response' is missing"),
        ("instruction", {"response": "x"}, "field 'instruction' is missing"),
        ("instruction", {"instruction": "x", "response": " "}, "field 'response' is empty"),
        ("text", {"text": 7}, "field 'text' is a int, not a text"),
        ("text", {"words": "x"}, "field 'text' is missing"),
        ("classification", {"text": "x"}, "field 'label' is missing"),
        ("classification", {"text": "x", "label": "secret"}, "field 'label' is none of the study"),
        ("classification", {"text": "x", "label": 2}, "field 'label' is none of the 2 labels"),
        ("text", "{broken", "field 'text' cannot be reached: broken JSON"),
    ],
)
def test_a_bad_row_is_named_and_not_shown(
    tmp_path: Path, kind: Any, row: Any, message: str
) -> None:
    good = {"instruction": "a", "response": "b", "text": "c", "label": "positive"}
    path = write(tmp_path / "rows.jsonl", good, row)
    with pytest.raises(DataError) as caught:
        read_questions(path, kind=kind, labels=LABELS)
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert "secret" not in str(caught.value) + caught.value.hint


def test_a_header_without_the_task_s_columns_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "question,response", "a,b")
    with pytest.raises(DataError, match=r"rows.csv:1: the header has no column 'instruction'"):
        read_questions(path, kind="instruction")


def test_a_response_follows_a_framed_prompt_and_ends() -> None:
    data = encode(RESPONSES, tokenizer(eos_token="<s>"), 32, "instruction")
    assert rows_of(data)[0] == ("Instruction: w1 w2 Response:", "w3 w4 w5 <s>")
    assert data.generative


def test_a_response_follows_the_chat_template() -> None:
    data = encode(RESPONSES, tokenizer(TEMPLATE), 32, "instruction")
    assert rows_of(data)[0] == ("[u] w1 w2 [/] [a]", "w3 w4 w5 [/]")


def test_a_template_that_rewrites_the_turns_still_ends_in_the_response() -> None:
    odd = (
        "{% if add_generation_prompt %}[u] {{ messages[0].content }} [a]{% else %}w8 w8{% endif %}"
    )
    data = encode(RESPONSES[:1], tokenizer(odd), 32, "instruction")
    assert rows_of(data) == [("[u] w1 w2 [a]", "w3 w4 w5")]


def test_a_template_that_fails_is_named_without_the_record() -> None:
    broken = "{{ raise_exception('no: ' + messages[0].content) }}"
    with pytest.raises(ConfigError, match=r"task.kind: the tokenizer's chat template") as caught:
        encode(RESPONSES, tokenizer(broken), 32, "instruction")
    assert "w1" not in str(caught.value)


def put(first: str, second: str = "{{ m.content }}") -> str:
    """A template with something before the turns, and its own idea of a turn."""
    return first + "{% for m in messages %}[u] " + second + " [/] {% endfor %}"


TODAY = "{{ strftime_now('%d %b %Y') }}"
NEEDY = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (put("", "{{ m.role }}"), "drops the question"),
        (put("", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"), "drops the response"),
        (put(NEEDY), "needs a system turn"),
        (put(TODAY), "writes today's date into every prompt"),
        (put("{% if strftime_now('%Y') > '2020' %}w1 {% endif %}"), "writes today's date"),
    ],
)
def test_a_template_that_does_not_put_records_alike_is_refused(template: str, says: str) -> None:
    """Silos that tune on other days would tune on other prompts; what is dropped is not learnt."""
    with pytest.raises(ConfigError, match=f"task.kind: .* chat template {says}") as caught:
        encode(RESPONSES, tokenizer(template), 32, "instruction")
    assert "\n" not in str(caught.value)
    assert "chat_template.jinja" in (caught.value.hint or "")


def test_a_date_that_the_template_fixes_is_no_harm() -> None:
    fixed = put("{% if day is not defined %}{% set day = 'w8' %}{% endif %}{{ day }} ")
    data = encode(RESPONSES[:1], tokenizer(fixed), 32, "instruction")
    assert rows_of(data)[0][0].startswith("w8 [u]")


def test_a_text_begins_with_a_start_token_or_its_own_first() -> None:
    starting = encode(TEXTS, tokenizer(bos_token="<s>"), 5, "text")
    assert rows_of(starting)[:2] == [("<s>", "w1 w2 w3 w4"), ("<s>", "w7 w8")]
    assert rows_of(encode(TEXTS, tokenizer(), 32, "text"))[1] == ("w7", "w8")
    with pytest.raises(DataError, match="question 0: its text has no token to predict"):
        encode([Question("", ("w1",), 0)], tokenizer(), 32, "text")


def test_a_public_instruction_without_its_response_keeps_none_of_it() -> None:
    many = [Question(f"w{i} w{j}", (f"w{j}",), 0) for i in range(9) for j in range(9)]
    split = split_questions(
        many, SplitPlan(silos=3, per_silo=9, public=18, public_labelled=6), seed=1
    )
    assert {q.choices for q in split.public_unlabelled} == {()}
    assert all(q.choices for q in split.public_labelled)
    data = encode(split.public_unlabelled, tokenizer(), 32, "instruction")
    assert not len(positions_of(data, "answer").at)
    everywhere = positions_of(data, "all")
    assert len(everywhere.at) == int((data.prompt_tokens - 1).sum())
    assert bool((everywhere.gold == -1).all())
    texts = [Question("", (f"w{i} w{j}",), 0) for i in range(9) for j in range(9)]
    split = split_questions(texts, SplitPlan(silos=3, per_silo=9, public=18), seed=1)
    assert all(q.choices and q.answer is None for q in split.public_unlabelled)


ENCODED = {
    "instruction": lambda: encode(RESPONSES, tokenizer(TEMPLATE), 32, "instruction"),
    "text": lambda: encode(TEXTS, tokenizer(), 32, "text"),
    "classification": lambda: encode(LABELLED, tokenizer(), 32, "classification"),
}


def adapted(toy: Any) -> Any:
    model = attach(toy.model(), method="lora", seed=1, rank=2)
    layout = layout_of(model, "lora")
    load_vector(model, layout, np.random.default_rng(3).normal(scale=0.2, size=layout.size))
    return model


def plain_losses(model: Any, data: EncodedQuestions) -> torch.Tensor:
    """−log p of the right continuation, one unpacked forward pass a record."""
    losses = []
    for i, answer in enumerate(data.answers.tolist()):
        prompt = data.tokens[i, : data.prompt_tokens[i]].tolist()
        follows = data.targets[i][data.target_choices[i] == answer].tolist()
        logits = model(torch.tensor([prompt + follows])).logits[0].log_softmax(-1)
        start = len(prompt) - 1
        losses.append(-sum(logits[start + k, token] for k, token in enumerate(follows)))
    return torch.stack(losses)


@pytest.mark.parametrize("kind", list(ENCODED))
def test_losses_and_per_record_gradients_are_those_of_single_passes(toy: Any, kind: str) -> None:
    data, model = ENCODED[kind](), adapted(toy)
    parameters = select(model, layout_of(model, "lora"))
    expected = plain_losses(model, data)
    with watched(model) as calls:
        losses = question_losses(model, data, "answer", PLAIN)
        found = per_record_gradients(losses, parameters, calls)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for i in range(len(data)):
        single = torch.autograd.grad(
            plain_losses(model, data.select(torch.tensor([i])))[0], parameters
        )
        for mine, theirs in zip(found, single, strict=True):
            torch.testing.assert_close(mine[i], theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", list(ENCODED))
def test_dp_sgd_learns_each_kind(toy: Any, kind: str) -> None:
    data, model = ENCODED[kind](), adapted(toy)
    before = question_losses(model, data, "answer", PLAIN).sum().item()
    result = train_dp(
        model,
        layout_of(model, "lora"),
        data,
        train_plan(steps=20, batch_size=len(data), learning_rate=0.03),
        protection(noise_multiplier=0.01),
        noise=NoiseSource(bytes(32)),
    )
    assert question_losses(model, data, "answer", PLAIN).sum().item() < 0.8 * before
    assert result.events[0].q == 1.0  # type: ignore[union-attr]


def test_a_trained_output_layer_takes_the_plain_way(toy: Any) -> None:
    data = ENCODED["text"]()
    model = attach(toy.model(), method="lora", seed=1, rank=2, targets=["lm_head", "q_proj"])
    layout = layout_of(model, "lora")
    load_vector(model, layout, np.random.default_rng(3).normal(scale=0.2, size=layout.size))
    parameters = select(model, layout)
    with watched(model) as calls:
        losses = question_losses(model, data, "answer", PLAIN)
        assert len(calls) == 6
    torch.testing.assert_close(losses, plain_losses(model, data), rtol=1e-4, atol=1e-5)
    assert any("lm_head" in name for name in layout.names)
    assert len(parameters) == len(layout.names)


def test_evaluation_counts_tokens(toy: Any) -> None:
    data, model = ENCODED["instruction"](), toy.model()
    result = evaluate(model, data, batch_size=2)
    logs, hits = [], []
    for i in range(3):
        prompt = data.tokens[i, : data.prompt_tokens[i]].tolist()
        follows = data.targets[i][data.target_choices[i] == 0].tolist()
        with torch.no_grad():
            said = model(torch.tensor([prompt + follows])).logits[0].log_softmax(-1)
        said = said[len(prompt) - 1 : -1]
        logs.append([said[k, t].item() for k, t in enumerate(follows)])
        hits.append([said[k].argmax().item() == t for k, t in enumerate(follows)])
    assert result.correct.tolist() == pytest.approx([np.mean(h) for h in hits])
    assert result.gold_log_prob.tolist() == pytest.approx([np.mean(v) for v in logs], rel=1e-4)
    score = result.score()
    flat = [value for row in logs for value in row]
    assert score.perplexity == pytest.approx(math.exp(-np.mean(flat)), rel=1e-4)
    assert score.exact_match == pytest.approx(np.mean([all(h) for h in hits]))
    assert result.by_group()["even"].count == 2


def test_exact_match_is_what_greedy_decoding_writes(toy: Any) -> None:
    data, model = ENCODED["text"](), toy.model()
    start = data.tokens[0, :1]
    with torch.no_grad():
        out = model.generate(
            start[None], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    follows = out[0, 1:].tolist()
    written = encode([Question("", (words([int(start), *follows]),), 0)], tokenizer(), 32, "text")
    assert rows_of(written)[0][1] == words(follows)
    assert evaluate(model, written).score().exact_match == 1.0
    assert choice_scores(model, written).shape == (1, 1)


@pytest.mark.parametrize("kind", list(ENCODED))
def test_fixed_passes_have_the_gradients_of_single_passes(toy: Any, kind: str) -> None:
    """Padding, dummies and shared calls of the output layer change nothing but last bits."""
    data, model = ENCODED[kind](), adapted(toy)
    layout = layout_of(model, "lora")
    rows = sampled_gradients(model, layout, data, LossPlan(), q=1.0, noise=NoiseSource())
    found = sorted(rows, key=lambda row: row[0])
    parameters = select(model, layout)
    single = []
    for i in range(len(data)):
        (loss,) = plain_losses(model, data.select(torch.tensor([i])))
        single.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    expected = sorted((row.numpy() for row in single), key=lambda row: row[0])
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-3, atol=1e-5)
