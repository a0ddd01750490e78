"""Questions → tokens: a prompt and what follows it, for every kind of task.

``instruction`` goes through the tokenizer's chat template where it has one, as one user's turn and
one assistant's; otherwise the prompt is framed by plain words and the response ends with the
end-of-text token. ``text`` starts with the beginning- or end-of-text token where there is one, and
is cut at the limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from securefedcollm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from securefedcollm.tuning.question import Question

Kind = Literal[
    "multiple_choice",
    "classification",
    "instruction",
    "text",
    "image_classification",
    "audio_classification",
]
Form = Kind | Literal["letters"]
"""How the rows are put together; ``letters`` of questions that are :func:`.question.lettered`."""


class Piece(NamedTuple):
    """Tokens of a stretch of text, and where they cut it.

    ``cuts[i]``: how many characters of the text are complete after token i; -1 if token i ends
    inside of a character, or outside of the text (a template's words, special tokens). ``start``:
    where the first token begins.
    """

    ids: list[int]
    cuts: list[int]
    start: int = 0

    def part(self, begin: int, end: int | None = None) -> Piece:
        """Some of the tokens."""
        return Piece(self.ids[begin:end], self.cuts[begin:end], self.start)

    def within(self, begin: int, length: int) -> Piece:
        """The same tokens; only cuts inside of text[begin : begin + length] count, from there.

        None counts if ``begin`` is negative: the text was not found.
        """
        length = length if begin >= 0 else 0
        moved = [cut - begin for cut in self.cuts]
        return Piece(self.ids, [c if 0 < c <= length else -1 for c in moved])


Row = tuple[Piece, list[Piece]]
"""A prompt, and everything that may follow it."""

INSTRUCTION = "Instruction: {}\nResponse:"


def tokenise(
    questions: Sequence[Question],
    tokenizer: Any,
    max_tokens: int,
    kind: Form,
    *,
    cuts: bool = False,
) -> list[Row]:
    """Prompt and choice tokens of every question.

    Args:
        cuts: find the cuts as well, for two tokenizers to be compared; else all are -1.

    Raises:
        DataError: one has an answer outside of its choices, lacks tokens, or its longest choice
            alone passes ``max_tokens``.
        ConfigError: ``cuts`` of a tokenizer that does not tell them.
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
    reader = _Reader(tokenizer, cuts)
    match kind:
        case "text":
            return _texts(questions, reader, max_tokens)
        case "instruction":
            if getattr(tokenizer, "chat_template", None):
                check_template(tokenizer)
            rows = [_instruction(question, reader) for question in questions]
        case "letters" if getattr(tokenizer, "chat_template", None):
            check_template(tokenizer)
            rows = [_opened(question, reader) for question in questions]
        case _:
            rows = _choices(questions, reader)
    return [
        (_shortened(prompt, choices, f"question {i}", tokenizer, max_tokens), choices)
        for i, (prompt, choices) in enumerate(rows)
    ]


class _Reader:
    """A tokenizer that returns :class:`Piece`."""

    def __init__(self, tokenizer: Any, cuts: bool) -> None:
        if cuts and not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} does not report where its tokens are in the text",
                where="distillation.over",
                hint="use models with fast tokenizers, or choose over: choices",
            )
        self.tokenizer, self._cuts = tokenizer, cuts

    def read(self, texts: list[str]) -> list[Piece]:
        """Every text; without the end token with which some tokenizers close every text."""
        end = self.tokenizer.eos_token_id
        pieces = self._read(texts)
        return [p.part(0, -1) if p.ids and p.ids[-1] == end else p for p in pieces]

    def read_bare(self, text: str) -> Piece:
        """One text without any token that the tokenizer adds."""
        return self._read([text], add_special_tokens=False)[0]

    def _read(self, texts: list[str], **options: Any) -> list[Piece]:
        if not self._cuts:
            rows = self.tokenizer(texts, **options)["input_ids"]
            return [Piece(ids, [-1] * len(ids)) for ids in rows]
        told = self.tokenizer(
            texts, return_offsets_mapping=True, return_special_tokens_mask=True, **options
        )
        columns = told["input_ids"], told["offset_mapping"], told["special_tokens_mask"]
        return [
            Piece(ids, _cuts(places, added)) for ids, places, added in zip(*columns, strict=True)
        ]


def _cuts(places: list[tuple[int, int]], added: list[int]) -> list[int]:
    """A token cuts the text at its end if the next one starts no earlier than that."""
    starts = [start for start, _ in places[1:]] + [1 << 60]
    last = [*added[1:], 1]
    return [
        end if not special and (starts[i] >= end or last[i]) else -1
        for i, ((_, end), special) in enumerate(zip(places, added, strict=True))
    ]


def _choices(questions: Sequence[Question], reader: _Reader) -> list[Row]:
    """The rows of all questions, in two calls of the tokenizer."""
    prompts = reader.read([q.prompt for q in questions])
    wholes = iter(reader.read([f"{q.prompt} {c}" for q in questions for c in q.choices]))
    return [
        (
            prompt.within(0, len(question.prompt)),
            [
                _continuation(prompt, next(wholes), question.prompt, c, reader)
                for c in question.choices
            ],
        )
        for question, prompt in zip(questions, prompts, strict=True)
    ]


def _continuation(prompt: Piece, whole: Piece, text: str, choice: str, reader: _Reader) -> Piece:
    """Tokens of ``" " + choice`` after ``prompt``: tokenised together where the split is clean."""
    count = len(prompt.ids)
    if whole.ids[:count] == prompt.ids:
        return whole.part(count).within(len(text) + 1, len(choice))
    return reader.read_bare(f" {choice}").within(1, len(choice))


def _instruction(question: Question, reader: _Reader) -> Row:
    asked, tokenizer = question.prompt, reader.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        framed = INSTRUCTION.format(asked)
        prompt = reader.read([framed])[0]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        follows = []
        for choice in question.choices:
            whole = reader.read([f"{framed} {choice}"])[0]
            piece = _continuation(prompt, whole, framed, choice, reader)
            follows.append(Piece(piece.ids + end, piece.cuts + [-1] * len(end)))
        return prompt.within(framed.index(asked), len(asked)), follows
    turn = [{"role": "user", "content": asked}]
    opening = _templated(tokenizer, turn, add_generation_prompt=True)
    prompt = reader.read_bare(opening)
    follows = []
    for response in question.choices:
        turns = [*turn, {"role": "assistant", "content": response}]
        both = _templated(tokenizer, turns)
        whole = reader.read_bare(both)
        if whole.ids[: len(prompt.ids)] == prompt.ids:
            piece = whole.part(len(prompt.ids))
            follows.append(piece.within(both.find(response, len(opening)), len(response)))
        else:  # a template that rewrites what came before, or a token across the border
            rest = both[len(opening) :] if both.startswith(opening) else response
            follows.append(reader.read_bare(rest).within(rest.find(response), len(response)))
    return prompt.within(opening.find(asked), len(asked)), follows


def _opened(question: Question, reader: _Reader) -> Row:
    """One turn of a chat, and what the answer begins with: a letter, straight after the opening."""
    turn = [{"role": "user", "content": question.prompt}]
    opening = _templated(reader.tokenizer, turn, add_generation_prompt=True)
    prompt = reader.read_bare(opening)
    wholes = [reader.read_bare(opening + choice) for choice in question.choices]
    count = len(prompt.ids)
    return prompt.within(opening.find(question.prompt), len(question.prompt)), [
        whole.part(count) if whole.ids[:count] == prompt.ids else reader.read_bare(choice)
        for whole, choice in zip(wholes, question.choices, strict=True)
    ]


def check_template(tokenizer: Any) -> None:
    """Refuse a chat template that drops what it is given, needs more, or follows the calendar.

    Raises:
        ConfigError: names the fault.
    """
    asked, answered = "zqAskedqz", "zqAnsweredqz"
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answered},
    ]

    def both(year: int) -> list[str]:
        with _date(datetime(year, year % 12, year % 28)):
            opening = _templated(tokenizer, turns[:1], add_generation_prompt=True)
            return [opening, _templated(tokenizer, turns)]

    opening, whole = both(2001)
    if asked not in opening:
        raise _template("drops the question")
    if answered not in whole and whole.startswith(opening):
        raise _template("drops the response")
    if both(2031) != [opening, whole]:
        # Silos that tune on other days would tune on other prompts.
        raise _template(
            "writes today's date into every prompt, so that it changes from day to day",
            "write a fixed date in place of strftime_now",
        )


@contextmanager
def _date(day: datetime) -> Iterator[None]:
    """Replace today's date in chat templates: transformers has no argument that overrules it."""
    from transformers.utils import chat_template_utils as library

    kept: Any = library.datetime
    library.datetime = SimpleNamespace(now=lambda: day)
    try:
        yield
    finally:
        library.datetime = kept


def _templated(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template is a program of the model's author
        if turns[0]["role"] != "system" and _takes_system(tokenizer, turns, options):
            raise _template("needs a system turn, and this task has none") from None
        # Its message may quote a record.
        raise _template(f"cannot render one question ({type(error).__name__})") from None
    return text


def _takes_system(tokenizer: Any, turns: list[dict[str, str]], options: dict[str, Any]) -> bool:
    try:
        _templated(tokenizer, [{"role": "system", "content": ""}, *turns], **options)
    except ConfigError:
        return False
    return True


def _template(what: str, hint: str = "mend it, or remove it") -> ConfigError:
    return ConfigError(
        f"the tokenizer's chat template {what}",
        where="task.kind",
        hint=f"{hint}: chat_template.jinja, or chat_template in tokenizer_config.json; all "
        "participants need the same",
    )


def _texts(questions: Sequence[Question], reader: _Reader, max_tokens: int) -> list[Row]:
    start = reader.tokenizer.bos_token_id
    if start is None:
        start = reader.tokenizer.eos_token_id
    rows: list[Row] = []
    for i, piece in enumerate(reader.read([q.choices[0] for q in questions])):
        if start is not None and piece.ids[:1] != [start]:
            piece = Piece([start, *piece.ids], [-1, *piece.cuts])
        if len(piece.ids) < 2 or max_tokens < 2:
            raise DataError(
                "its text has no token to predict", where=f"question {i}", hint="remove it"
            )
        first, rest = piece.part(0, 1), piece.part(1, max_tokens)
        rows.append((Piece(first.ids, [-1]), [rest._replace(start=max(0, first.cuts[0]))]))
    return rows


def _shortened(
    prompt: Piece, choices: list[Piece], where: str, tokenizer: Any, max_tokens: int
) -> Piece:
    """``prompt`` without the beginning for which its longest choice leaves no room."""
    if not prompt.ids or not all(choice.ids for choice in choices):
        raise DataError(
            "its prompt or one of its choices has no tokens", where=where, hint="remove it"
        )
    longest = max((len(choice.ids) for choice in choices), default=0)
    room = max_tokens - longest
    if room < 2:
        raise DataError(
            f"a choice or response has {longest} tokens, the limit is {max_tokens}",
            where=where,
            hint="shorten it or raise task.max_tokens",
        )
    if len(prompt.ids) <= room:
        return prompt
    kept = prompt.part(len(prompt.ids) - room)
    if prompt.ids[0] == tokenizer.bos_token_id:
        return Piece([prompt.ids[0], *kept.ids[1:]], [-1, *kept.cuts[1:]])
    return kept
