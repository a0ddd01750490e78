"""Use a tuned adapter with PEFT and transformers alone: score labelled records by its task.json.

    python plain_peft.py ADAPTER BASE_MODEL RECORDS.jsonl

ADAPTER is the directory with adapter_model.safetensors and task.json; BASE_MODEL a directory or a
name on the hub. Prints the accuracy, the same as `securefedcollm model evaluate`. Nothing here
imports securefedcollm: take what you need.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def prompt_of(row: dict[str, Any], task: dict[str, Any]) -> str:
    """The prompt as the model was tuned on it; a column `prompt` stands for itself."""
    if str(row.get("prompt") or "").strip():
        return str(row["prompt"]).strip()
    column = {"multiple_choice": "question", "classification": "text"}[task["kind"]]
    return str(task["template"].replace("{}", row[named(column, task)].strip()))


def named(column: str, task: dict[str, Any]) -> str:
    """What the records' files call a column."""
    return str(task["columns"].get(column, column))


def choices_of(row: dict[str, Any], task: dict[str, Any]) -> tuple[list[str], int]:
    """What may follow the prompt, and which of it is right."""
    if task["kind"] == "multiple_choice":
        choices, answer = row[named("choices", task)], row[named("answer", task)]
        return [choice.strip() for choice in choices], int(answer)
    return task["labels"], task["labels"].index(row[named("label", task)].strip())


def by_letters(
    prompt: str, choices: list[str], tokenizer: Any, how: dict[str, Any]
) -> tuple[str, list[str]]:
    """The prompt with its choices listed, and their letters."""
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    lines = [prompt.removesuffix(how["without"]).rstrip()]
    for letter, choice in zip(letters, choices, strict=True):
        lines.append(how["line"].format(letter=letter, choice=choice))
    text = "\n".join([*lines, how["end"]])
    if how["chat_template"]:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return text, letters


def tokenise(
    prompt: str,
    choices: list[str],
    tokenizer: Any,
    most: int = 1 << 30,
    space: str = " ",
    bare: bool = False,
) -> list[tuple[list[int], int]]:
    """Of each choice: the tokens of the prompt and of the choice; how many are the choice's."""

    def ids(text: str, add_special_tokens: bool = not bare) -> list[int]:
        found = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        # Some tokenizers close every text with an end token.
        return found[:-1] if found[-1] == tokenizer.eos_token_id else found

    first, rest = ids(prompt), []
    for choice in choices:
        both = ids(f"{prompt}{space}{choice}")
        apart = both[: len(first)] == first  # else a token goes across the border
        rest.append(both[len(first) :] if apart else ids(f"{space}{choice}", False))
    room = most - max(map(len, rest))  # the longest decides
    if len(first) > room:  # the beginning is left out, but for the token that begins every text
        start = first[:1] if first[0] == tokenizer.bos_token_id else []
        first = start + first[len(first) - room + len(start) :]
    return [(first + after, len(after)) for after in rest]


@torch.no_grad()
def log_prob(model: Any, tokens: list[int], count: int) -> float:
    """Log-probability of the last ``count`` tokens after those before them."""
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids).logits[0, -count - 1 : -1].float()
    return float(torch.log_softmax(logits, -1).gather(1, ids[0, -count:, None]).sum())


def scores_of(
    model: Any, tokenizer: Any, prompt: str, choices: list[str], task: dict[str, Any]
) -> list[float]:
    """The scores of the choices: the prediction is softmax(scores / score_temperature)."""
    bare = False
    if task["letters"]:  # an exam: the choices are listed, and the model names a letter
        bare = task["letters"]["chat_template"]
        prompt, choices = by_letters(prompt, choices, tokenizer, task["letters"])
    rows = tokenise(
        prompt, choices, tokenizer, task["max_tokens"], space=task["before_answer"], bare=bare
    )
    scores = [log_prob(model, *row) for row in rows]
    if task["prior_prompt"]:  # what the base model says of the choice by itself
        with model.disable_adapter():
            prior = [
                log_prob(model, *row) for row in tokenise(task["prior_prompt"], choices, tokenizer)
            ]
        scores = [score - other for score, other in zip(scores, prior, strict=True)]
    if task["score"] in {"length", "pmi-length"}:
        scores = [score / max(1, len(c)) for score, c in zip(scores, choices, strict=True)]
    return scores


def main(adapter: str, base: str, records: str) -> None:
    """Print the accuracy on the file ``records``."""
    task = json.loads(Path(adapter, "task.json").read_text())
    if task["kind"] not in {"multiple_choice", "classification"}:
        sys.exit(f"{task['kind']}: this example scores choices and labels only")
    dtype = getattr(torch, task["base"]["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    rounded = None
    if task["base"].get("quantization") == "int8":
        rounded = BitsAndBytesConfig(load_in_8bit=True)
    elif task["base"].get("quantization") == "nf4":
        four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        rounded = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **four_bits)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=rounded)
    model = PeftModel.from_pretrained(model, adapter).eval()
    right = count = 0
    for line in Path(records).read_text().splitlines():
        row = json.loads(line)
        prompt = prompt_of(row, task)
        choices, answer = choices_of(row, task)
        scores = scores_of(model, tokenizer, prompt, choices, task)
        right += scores.index(max(scores)) == answer
        count += 1
    print(json.dumps({"accuracy": right / count, "count": count}))


if __name__ == "__main__":
    main(*sys.argv[1:])
