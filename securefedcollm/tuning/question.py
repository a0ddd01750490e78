"""A record of any task: a prompt, its choices and the right one; and how to ask it.

A small base model answers best if each choice is scored as the text that follows the question
(*cloze*, as in lm-eval). An instruct model of a billion weights or more answers best if the choices
are listed and it names a letter, as in an exam (*letters*). Two models that are asked differently
still speak of the same choices, so distillation compares their distributions over choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Final, Literal

from securefedcollm.errors import DataError

Ask = Literal["cloze", "letters"]
LETTERS: Final = ascii_uppercase
BY_LETTER: Final = "Answer with the letter only."
"""The last line of a chat's turn."""
CUE: Final = "\nAnswer:"
"""The last line where there is no chat."""


@dataclass(frozen=True)
class Question:
    """One prompt and its choices; ``answer`` is None on an unlabelled public prompt.

    A choice is joined to the prompt by one space, so neither end carries it. ``group`` names the
    column of the result table (``general``, ``private``). ``subject`` says whose record it is,
    where that is the unit of privacy. ``content`` is a digest of the words of the row that this was
    read from, whatever the task makes of them, and ``row`` one of all text in it; empty where there
    was no row. ``signal`` is what is asked about, where that is no text (:mod:`.media`); then the
    prompt is its name, which no other signal has.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | None
    group: str = ""
    subject: str | None = None
    content: bytes = field(default=b"", compare=False, repr=False)
    row: bytes = field(default=b"", compare=False, repr=False)
    signal: bytes = field(default=b"", compare=False, repr=False)

    def unlabelled(self) -> Question:
        """The question without its answer; a response is the answer itself, so it goes too."""
        alone = len(self.choices) == 1 and self.prompt
        return replace(self, answer=None, choices=() if alone else self.choices)


def lettered(question: Question, cue: str, *, chat: bool) -> Question:
    """The question with its choices in the prompt, each behind a letter; the choices are letters.

    Args:
        cue: what the task's template puts after the text, e.g. "\\nAnswer:". The prompt loses it.
        chat: the prompt is a turn of a chat, which ends with :data:`BY_LETTER`.

    Raises:
        DataError: there are more choices than letters.
    """
    count = len(question.choices)
    if count > len(LETTERS):
        raise DataError(
            f"has {count} choices, and there are {len(LETTERS)} letters",
            where="ask: letters",
            hint="choose ask: cloze for both models",
        )
    asked = question.prompt.removesuffix(cue) if cue else question.prompt
    listed = zip(LETTERS, question.choices, strict=False)
    lines = [asked.rstrip(), *(f"{letter}. {choice}" for letter, choice in listed)]
    prompt = "\n".join([*lines, BY_LETTER]) if chat else "\n".join(lines) + CUE
    return replace(question, prompt=prompt, choices=tuple(LETTERS[:count]))
