"""Answers with passages: what the model is given, and what it is said to cite."""

from __future__ import annotations

from typing import Any

import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.tuning import cited
from securefedcollm.tuning.cited import write_answer
from securefedcollm.tuning.models import LoadedModel
from tests.support.models import llama, word_level

WORDS = ["<pad>", "<unk>", *(f"w{i}" for i in range(30))]
CHAT = "{% for message in messages %}w0 {{ message['content'] }} w0 {% endfor %}"


def loaded(positions: int = 32, chat: str | None = None) -> LoadedModel:
    tokenizer = word_level(WORDS, pad_token="<pad>")
    tokenizer.chat_template = chat
    model = llama(len(WORDS), max_position_embeddings=positions, pad_token_id=0)
    return LoadedModel(model, tokenizer, {})


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What the model was asked, and whether as a turn of a chat; it answers with numbers."""
    asked: list[tuple[str, bool]] = []

    def answer(model: Any, prompt: str, *, instruction: bool, **options: Any) -> str:
        asked.append((prompt, instruction))
        return "As [2] and [2] say, and [7] does not."

    monkeypatch.setattr(cited, "generate", answer)
    return asked


def test_a_chat_model_is_told_to_name_passages(prompts):
    written = write_answer(loaded(200, CHAT), "w1 w2", ["w3\nw4", "w5", "w6"], max_tokens=4)
    ((prompt, chat),) = prompts
    assert chat
    assert prompt.startswith("Answer the question")
    assert prompt.endswith("\n\n[1] w3 w4\n\n[2] w5\n\n[3] w6\n\nQuestion: w1 w2")
    assert (written.given, written.named) == ((1, 2, 3), (2,))


def test_a_plain_model_continues_the_passages_best_last(prompts):
    write_answer(loaded(), "w1 w2", ["w3", "w4"], max_tokens=4)
    assert prompts == [("w4\nw3\nw1 w2", False)]


def test_the_worst_passages_are_left_out_where_there_is_no_room(prompts):
    passages = [" ".join([word] * 10) for word in ("w3", "w4", "w5")]
    written = write_answer(loaded(32), "w1 w2", passages, max_tokens=4)
    assert written.given == (1, 2)
    assert "w5" not in prompts[0][0]
    assert write_answer(loaded(12), "w1 w2", passages, max_tokens=4).given == ()
    with pytest.raises(ConfigError, match="do not fit"):
        write_answer(loaded(5), "w1 w2", passages, max_tokens=4)


def test_an_answer_is_what_the_model_writes():
    written = write_answer(loaded(), "w1 w2", ["w3"], max_tokens=4)
    assert written.text
    assert set(written.text.split()) <= set(WORDS)
