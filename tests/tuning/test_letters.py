"""Questions put by letters, and the choice of a form and a temperature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from securefedcollm.errors import DataError
from securefedcollm.tuning.calibrate import Plan, best_temperature, calibrate, gold
from securefedcollm.tuning.evaluate import measure
from securefedcollm.tuning.formats import QUESTION, Asking
from securefedcollm.tuning.models import LoadedModel, load_model, save_model
from securefedcollm.tuning.question import BY_LETTER, Question, lettered
from securefedcollm.tuning.questions import Scoring, encode

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def characters(chat: bool) -> PreTrainedTokenizerFast:
    """Every printable ASCII character is a token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    known = ["?unknown", "\n", *map(chr, range(32, 127))]
    inner = Tokenizer(WordLevel({c: i for i, c in enumerate(known)}, unk_token="?unknown"))
    inner.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?unknown")
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    tokenizer, place = characters(request.param), tmp_path_factory.mktemp("model") / "m"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        save_model(LlamaForCausalLM(config), tokenizer, place)
    return load_model(f"path:{place}")


def asked(text: str, choices: Sequence[str], answer: int | None = 0) -> Question:
    return Question(QUESTION.format(text), tuple(choices), answer)


def test_a_question_lists_its_choices() -> None:
    question = asked("Which is largest?", ["a cat", "a house"], 1)
    plain = lettered(question, "\nAnswer:", chat=False)
    assert plain.prompt == "Question: Which is largest?\nA. a cat\nB. a house\nAnswer:"
    chat = lettered(question, "\nAnswer:", chat=True)
    assert chat.prompt == f"Question: Which is largest?\nA. a cat\nB. a house\n{BY_LETTER}"
    assert (chat.choices, chat.answer) == (("A", "B"), 1)
    own = Question("Say it.", ("x", "y"), 0)  # a column `prompt`
    assert lettered(own, "\nAnswer:", chat=False).prompt == "Say it.\nA. x\nB. y\nAnswer:"
    with pytest.raises(DataError, match="has 27 choices, and there are 26 letters"):
        lettered(asked("?", [str(i) for i in range(27)]), "", chat=True)


def test_the_cue_of_a_template_is_the_cue(loaded: LoadedModel) -> None:
    (one,), form = Asking("multiple_choice", "letters", "Q {} =>").put(
        [Question("Q 1 + 1 =>", ("2", "3"), 0)], loaded.tokenizer
    )
    assert one.prompt.startswith("Q 1 + 1\nA. 2\nB. 3\n")
    assert form == "letters"


def test_scores_of_letters_are_the_models(loaded: LoadedModel) -> None:
    """Against the library itself: the probability of the letter where the answer begins."""
    questions = [asked("a?", ["up", "down"], 1), asked("what of b?", ["no", "yes", "maybe"], 2)]
    tokenizer, chat = loaded.tokenizer, bool(loaded.tokenizer.chat_template)
    found, form = Asking(ask="letters").put(questions, tokenizer)
    data = encode(found, tokenizer, 256, form)
    result = measure(
        loaded,
        questions,
        adapter=None,
        asking=Asking(ask="letters"),
        scoring=Scoring(),
        max_tokens=256,
    )
    expected = []
    for question, put in zip(questions, found, strict=True):
        if chat:
            turn = [{"role": "user", "content": put.prompt}]
            ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
            letters = [tokenizer(letter)["input_ids"] for letter in put.choices]
        else:
            ids = tokenizer(put.prompt)["input_ids"]
            letters = [tokenizer(f" {letter}")["input_ids"] for letter in put.choices]
        scores = []
        for letter in letters:
            whole = torch.tensor([ids + letter])
            with torch.inference_mode():
                log_p = torch.log_softmax(loaded.model(input_ids=whole).logits[0], -1)
            scores.append(sum(log_p[len(ids) - 1 + i, token] for i, token in enumerate(letter)))
        assert question.answer is not None
        expected.append(float(torch.log_softmax(torch.stack(scores), 0)[question.answer]))
    assert result["all"]["gold_log_prob"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert data.choice_lengths.max() == 1


def test_the_best_temperature_is_the_best() -> None:
    draw = np.random.default_rng(5)
    answers = draw.integers(0, 4, 300)
    scores = draw.normal(size=(300, 4)) * 20
    scores[np.arange(300), answers] += 15  # right more often than not, and much too sure
    scores[7, 3] = -np.inf  # a question of three choices
    answers[7] = 0
    found = best_temperature(scores, answers)
    grid = np.exp(np.linspace(np.log(0.1), np.log(500), 4_000))
    best = max(grid, key=lambda t: gold(scores, answers, float(t)))
    assert found == pytest.approx(best, rel=5e-3)
    assert gold(scores, answers, found) > gold(scores, answers, 1.0)


def test_calibration_tries_every_form(loaded: LoadedModel) -> None:
    questions = [asked(f"{i}?", ["no", "maybe", "yes!"], i % 3) for i in range(12)]
    forms = calibrate(loaded, questions, Plan(Asking()))
    tried = {(form.ask, form.score) for form in forms}
    cloze = {("cloze", rule) for rule in ("plain", "length", "pmi", "pmi-length")}
    assert tried == {("letters", "plain")} | cloze
    assert forms == sorted(forms, key=lambda form: -form.gold_log_prob)
    for form in forms:
        assert form.gold_log_prob >= form.uncalibrated - 1e-6
        scores = measure(
            loaded,
            questions,
            adapter=None,
            asking=Asking(ask=form.ask),
            scoring=Scoring(form.score, form.temperature),
            max_tokens=256,
        )["all"]
        assert scores["gold_log_prob"] == pytest.approx(form.gold_log_prob, abs=1e-4)
        assert scores["accuracy"] == form.accuracy


def test_a_record_without_an_answer_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="has no answer"):
        calibrate(loaded, [asked("?", ["x", "y"], None)], Plan(Asking()))
