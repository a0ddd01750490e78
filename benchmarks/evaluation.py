"""Packed choices against one forward pass per choice.

    securefedcollm model prepare smollm2
    python -m benchmarks.evaluation --json

Questions come from the Python language reference: a passage of some 60 words is the prompt; words
that follow it and words that follow three other passages are the choices. Both ways use the same
code, the same model, batches of the same number of rows sorted by length, and compute output logits
for the choices' tokens only; the peer gets every (prompt, choice) as a row of its own, as lm-eval
does. Times are medians of process CPU time on one thread, in turn; ratios are medians over the
repeats.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._machine import machine
from securefedcollm.tuning.models import load_model
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import by_length, choice_scores, encode
from securefedcollm.tuning.recipe import inference_mode
from securefedcollm.tuning.smollm2 import healing_text


def make_questions(count: int, prompt_words: int, choices: int) -> list[Question]:
    """Which words follow the passage? Choices of 4 to 12 words."""
    draw = random.Random(0)
    words = " ".join(healing_text()).split()

    def passage() -> tuple[str, str]:
        start = draw.randrange(len(words) - prompt_words - 12)
        stop = start + prompt_words + draw.randrange(-prompt_words // 4, prompt_words // 4)
        return " ".join(words[start:stop]), " ".join(words[stop : stop + draw.randint(4, 12)])

    questions = []
    for _ in range(count):
        prompt, right = passage()
        others = [passage()[1] for _ in range(choices - 1)]
        answer = draw.randrange(choices)
        questions.append(Question(prompt, (*others[:answer], right, *others[answer:]), answer))
    return questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--prompt-words", type=int, default=60)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON (the only output there is)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(given.model)
    questions = make_questions(given.questions, given.prompt_words, given.choices)
    packed = encode(questions, loaded.tokenizer, 512)
    singles = [Question(q.prompt, (c,), 0) for q in questions for c in q.choices]
    single = encode(singles, loaded.tokenizer, 512)

    def score(data: object) -> Tensor:
        scores = torch.zeros(data.choice_mask.shape)  # type: ignore[attr-defined]
        with inference_mode(loaded.model):
            for rows, batch in by_length(data, given.rows):  # type: ignore[arg-type]
                scores[rows] = choice_scores(loaded.model, batch)
        return scores.reshape(len(questions), given.choices)

    ways: list[Callable[[], Tensor]] = [lambda: score(packed), lambda: score(single)]
    times: list[list[float]] = [[], []]
    answers: list[Tensor] = []
    for _ in range(given.repeats):
        answers = []
        for way, taken in zip(ways, times, strict=True):
            start = time.process_time()
            answers.append(way())
            taken.append(time.process_time() - start)
    right = torch.tensor([q.answer for q in questions])
    print(
        json.dumps(
            {
                "model": given.model,
                "questions": given.questions,
                "choices": given.choices,
                "packed_cpu_s": round(statistics.median(times[0]), 3),
                "one_pass_per_choice_cpu_s": round(statistics.median(times[1]), 3),
                "speedup": round(statistics.median(b / a for a, b in zip(*times, strict=True)), 3),
                "same_answers": bool(torch.equal(answers[0].argmax(1), answers[1].argmax(1))),
                "largest_score_difference": float((answers[0] - answers[1]).abs().max()),
                "accuracy": float((answers[0].argmax(1) == right).float().mean()),
                "machine": machine("torch", "transformers"),
            }
        )
    )


if __name__ == "__main__":
    main()
