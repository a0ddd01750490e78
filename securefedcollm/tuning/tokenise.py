"""Questions → tokens: a prompt and what follows it, for every kind of task.

``instruction`` goes through the tokenizer's chat template where it has one, as one user's turn and
one assistant's; otherwise the prompt is framed by plain words and the response ends with the
end-of-text token. ``text`` starts with the beginning- or end-of-text token where there is one, and
is cut at the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from securefedcollm.errors import DataError

if TYPE_CHECKING:
    from securefedcollm.tuning.questions import Question

Kind = Literal["multiple_choice", "classification", "instruction", "text"]
Row = tuple[list[int], list[list[int]]]
"""The tokens of a prompt, and of everything that may follow it."""

INSTRUCTION = "Instruction: {}\nResponse:"


def tokenise(
    questions: Sequence[Question], tokenizer: Any, max_tokens: int, kind: Kind
) -> list[Row]:
    """Prompt and choice tokens of every question.

    Raises:
        DataError: one has an answer outside of its choices, lacks tokens, or its longest choice
            alone passes ``max_tokens``.
    """
    for i, question in enumerate(questions):
        if not question.choices and kind != "instruction":
            raise DataError(
                "it has no choices", where=f"question {i}", hint="give at least one choice"
            )
        if question.answer is not None and not 0 <= question.answer < len(question.choices):
            raise DataError(
                f"answer {question.answer} is outside its {len(question.choices)} choices",
                where=f"question {i}",
                hint="number the choices from 0",
            )
    match kind:
        case "text":
            return _texts(questions, tokenizer, max_tokens)
        case "instruction":
            rows = [_instruction(question, tokenizer) for question in questions]
        case _:
            rows = _choices(questions, tokenizer)
    return [
        (_shortened(prompt, choices, f"question {i}", tokenizer, max_tokens), choices)
        for i, (prompt, choices) in enumerate(rows)
    ]


def _choices(questions: Sequence[Question], tokenizer: Any) -> list[Row]:
    """In two calls of the tokenizer."""
    prompts = _ids([q.prompt for q in questions], tokenizer)
    wholes = iter(_ids([f"{q.prompt} {c}" for q in questions for c in q.choices], tokenizer))
    return [
        (prompt, [_continuation(prompt, next(wholes), c, tokenizer) for c in question.choices])
        for question, prompt in zip(questions, prompts, strict=True)
    ]


def _instruction(question: Question, tokenizer: Any) -> Row:
    if not getattr(tokenizer, "chat_template", None):
        framed = INSTRUCTION.format(question.prompt)
        prompt = _ids([framed], tokenizer)[0]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        wholes = (
            _ids([f"{framed} {c}" for c in question.choices], tokenizer) if question.choices else []
        )
        follows = [
            [*_continuation(prompt, whole, choice, tokenizer), *end]
            for whole, choice in zip(wholes, question.choices, strict=True)
        ]
        return prompt, follows
    turn = [{"role": "user", "content": question.prompt}]
    opening: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(opening, add_special_tokens=False)["input_ids"]
    follows = []
    for response in question.choices:
        turns = [*turn, {"role": "assistant", "content": response}]
        both: str = tokenizer.apply_chat_template(turns, tokenize=False)
        whole = tokenizer(both, add_special_tokens=False)["input_ids"]
        if whole[: len(prompt)] != prompt:  # a template that rewrites what came before
            rest = both[len(opening) :] if both.startswith(opening) else response
            follows.append(tokenizer(rest, add_special_tokens=False)["input_ids"])
        else:
            follows.append(whole[len(prompt) :])
    return prompt, follows


def _texts(questions: Sequence[Question], tokenizer: Any, max_tokens: int) -> list[Row]:
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    rows = []
    for i, ids in enumerate(_ids([q.choices[0] for q in questions], tokenizer)):
        if start is not None and ids[:1] != [start]:
            ids = [start, *ids]
        if len(ids) < 2 or max_tokens < 2:
            raise DataError(
                "its text has no token to predict", where=f"question {i}", hint="remove it"
            )
        rows.append((ids[:1], [ids[1:max_tokens]]))
    return rows


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokens of every text; without the end token with which some tokenizers close every text."""
    end = tokenizer.eos_token_id
    rows: list[list[int]] = tokenizer(texts)["input_ids"]
    return [row[:-1] if row and row[-1] == end else row for row in rows]


def _continuation(prompt: list[int], whole: list[int], choice: str, tokenizer: Any) -> list[int]:
    """Tokens of ``" " + choice`` after ``prompt``: tokenised together where the split is clean."""
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    ids: list[int] = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
    return ids


def _shortened(
    prompt: list[int], choices: list[list[int]], where: str, tokenizer: Any, max_tokens: int
) -> list[int]:
    """``prompt`` without the beginning for which its longest choice leaves no room."""
    if not prompt or not all(choices):
        raise DataError(
            "its prompt or one of its choices has no tokens", where=where, hint="remove it"
        )
    longest = max(map(len, choices), default=0)
    room = max_tokens - longest
    if room < 2:
        raise DataError(
            f"a choice or response has {longest} tokens, the limit is {max_tokens}",
            where=where,
            hint="shorten it or raise task.max_tokens",
        )
    if len(prompt) <= room:
        return prompt
    begin = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    return begin + prompt[len(prompt) - room + len(begin) :]
