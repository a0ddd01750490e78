"""The files beside an adapter, so that somebody without this program can use it.

``task.json`` is the contract: how a record becomes a prompt, and how choices are scored. README.md
is the model card. Both follow from the study and the base model alone, and hold nothing of a silo.
``docs/adapters.md`` describes them; ``examples/plain_peft.py`` uses them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import printable, read_object
from securefedcollm.study import Study, digest
from securefedcollm.study.config import Model, Task
from securefedcollm.tuning.formats import CLASSIFY, QUESTION, Asking, cue_of
from securefedcollm.tuning.frozen import PMI_PROMPT
from securefedcollm.tuning.question import BY_LETTER, CUE
from securefedcollm.tuning.questions import Normalisation
from securefedcollm.tuning.sounds import LEAST, MOST_SECONDS, RATE
from securefedcollm.tuning.tokenise import INSTRUCTION
from securefedcollm.version import __version__

FORMAT: Final = "securefedcollm-task-v1"
CONTRACT: Final = "task.json"
CARD: Final = "README.md"
_TAGS: Final = {"prompt": "prompt-tuning", "prefix": "prefix-tuning"}
_EARLIER: Final = """
**This adapter does not fit the base model alone.** The study continues earlier runs, whose adapters
have to be merged into the base model first, oldest first: `task.json` names them. `securefedcollm
model merge --run` of this run writes the whole model.
"""
_WHOLE: Final = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("the directory of this file")
tokenizer = AutoTokenizer.from_pretrained("the directory of this file")"""
_PROMPTS: Final = (
    "The model was tuned on prompts of one form and scores answers in one way: `task.json` says "
    "which.\nWith another form it is much worse. The scored answer follows the prompt after "
    "`before_answer`."
)
_SIGNALS: Final = (
    "The classes are the `labels` of `task.json`, in their order. `head.safetensors` is the class "
    "head that the\nadapter was tuned with; no other fits."
)
_CLASSIFIER: Final = """from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelFor{kind}Classification

base = {base}
{loaded} = AutoModelFor{kind}Classification.from_pretrained(base{revision}, {given})
{then}head = load_file("head.safetensors of this directory")
name = next(key for key in head if key.endswith(".weight")).removesuffix(".weight")
classes, width = head[name + ".weight"].shape
model.set_submodule(name, nn.Linear(width, classes))
model.load_state_dict(head, strict=False)
model = PeftModel.from_pretrained(model, "the directory of this file")"""
_PROJECTOR: Final = """if any(key.startswith("projector.") for key in info["missing_keys"]):
    model.projector = nn.Identity()
"""
_BITSANDBYTES: Final = {
    "int8": "load_in_8bit=True",
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    'bnb_4bit_compute_dtype="{}"',
}
_TEMPLATES: Final = {
    "multiple_choice": QUESTION,
    "classification": CLASSIFY,
    "instruction": INSTRUCTION,
    "text": "",
    "image_classification": "",
    "audio_classification": "",
}
_CLASSES: Final = {"image_classification": "Image", "audio_classification": "Audio"}
"""The kinds whose models are classifiers, and what ``transformers`` calls these."""


def beside_adapter(study: Study, model: Model, base: bytes, *, chat: bool) -> dict[str, bytes]:
    """The two files, by name.

    Args:
        model: which of the study's models was tuned; ``base``: its digest, 32 bytes.
        chat: its tokenizer has a chat template, which instructions go through.
    """
    contract = task_contract(study, model, base, chat=chat)
    text = json.dumps(contract, indent=2, ensure_ascii=False) + "\n"
    return {CONTRACT: text.encode(), CARD: model_card(study, contract).encode()}


def seconds_beside(adapter: Path | None) -> float:
    """The seconds of a recording that an adapter in ``adapter`` was tuned to hear.

    Returns:
        What its contract says; without an adapter or a contract, a study's usual ones.

    Raises:
        ConfigError: the contract cannot be read, or says what no study can.
    """
    if adapter is None or not (file := adapter / CONTRACT).exists():
        return Task().max_seconds
    try:
        said = read_object(file).get("max_seconds", Task().max_seconds)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read ({type(error).__name__})",
            where=str(file),
            hint="put back the file that the run wrote",
        ) from None
    if not isinstance(said, int | float) or not LEAST / RATE <= said <= MOST_SECONDS:
        raise ConfigError(
            "max_seconds is no number from 0.1 to 60",
            where=str(file),
            hint="put back the file that the run wrote",
        )
    return float(said)


def task_contract(study: Study, model: Model, base: bytes, *, chat: bool) -> dict[str, Any]:
    """All that a prompt and a score depend on, as plain JSON."""
    task = study.task
    by_chat = task.kind == "instruction" and chat
    rule = rule_of(task, model)
    return {
        "format": FORMAT,
        "study": study.study,
        "study_sha256": digest(study).hex(),
        "base": {
            "source": model.source,
            "revision": model.revision,
            "sha256": base.hex(),
            "dtype": model.dtype,
            **_quantised(model),
        },
        "kind": task.kind,
        "columns": task.columns,
        "template": None if by_chat else task.template or _TEMPLATES[task.kind],
        "chat_template": by_chat,
        "labels": task.labels,
        "ask": model.ask,
        "letters": _letters(study, chat) if model.ask == "letters" else None,
        "before_answer": "" if model.ask == "letters" and chat else " ",
        "score": rule,
        "score_temperature": model.temperature or task.score_temperature,
        "prior_prompt": PMI_PROMPT if rule.startswith("pmi") else None,
        "max_tokens": task.max_tokens,
        **({"max_seconds": task.max_seconds} if task.kind == "audio_classification" else {}),
        **_continues(study),
    }


def _continues(study: Study) -> dict[str, Any]:
    """What to add to the base model before the adapter fits, if anything."""
    if study.continues is None:
        return {}
    links = [
        {
            "study_sha256": link.study,
            "scale": link.scale,
            "slm": link.slm,
            "llm": link.llm,
        }
        for link in study.continues.earlier
    ]
    return {"continues": links}


def _quantised(model: Model) -> dict[str, Any]:
    """What the base's weights are rounded to, if anything."""
    return {} if model.quantization == "none" else {"quantization": model.quantization}


def rule_of(task: Task, model: Model) -> Normalisation:
    """``task.score``; but a letter has no length and no prior of its own."""
    return "plain" if model.ask == "letters" else task.score


def _letters(study: Study, chat: bool) -> dict[str, Any]:
    """How the template's prompt becomes one that lists its choices (:func:`.question.lettered`)."""
    cue = cue_of(Asking(study.task.rows, "letters", study.task.template))
    end = BY_LETTER if chat else CUE.strip()
    return {"without": cue, "line": "{letter}. {choice}", "end": end, "chat_template": chat}


def model_card(study: Study, contract: dict[str, Any]) -> str:
    """Markdown, with the front matter that model hubs read.

    Adversary: the study's author, whose names are in it: they are quoted as code, on one line.
    """
    base = contract["base"]
    kind, _, place = base["source"].partition(":")
    hub = f"base_model: {json.dumps(place)}\n" if kind == "hub" else ""
    at_most = "at most " if study.keep else ""
    chain = contract.get("continues", [])
    rows = {
        "base model": f"{_code(base['source'])}{_code(base['revision'], ', commit ')}",
        "digest of the base model": _code(base["sha256"]),
        "study": f"{_code(study.study)}, digest {_code(contract['study_sha256'])}",
        "adapter": study.adapter.summary,
        "tuned by": f"{study.silos.count} silos, {at_most}{study.rounds} rounds",
        "task": contract["kind"] + "".join(_code(label, ", ") for label in contract["labels"]),
        "privacy": _privacy(study),
    }
    method = study.adapter.method
    tag = _TAGS.get(method, "lora")
    what = "a LoRA adapter" if tag == "lora" else f"a {method} of virtual tokens"
    if method == "full":
        what, tag, hub = (
            "a whole model",
            "full-fine-tuning",
            hub and f"{hub}base_model_relation: finetune\n",
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: {"transformers" if method == "full" else "peft"}
{hub}tags: [federated-learning, {tag}]
---

# {_code(study.study)}: {what}, tuned without its records leaving their silos

Made by securefedcollm {__version__}.

| | |
| --- | --- |
{table}

## How to load it
{_EARLIER if chain else ""}
```python
{_how(study, base)}
```

`securefedcollm model digest` prints the digest of a base model, to be compared with the one above.

## How to ask it

{_SIGNALS if study.task.kind in _CLASSES else _PROMPTS}
"""


def _how(study: Study, base: dict[str, Any]) -> str:
    """Python that loads what was made."""
    if study.adapter.method == "full":
        return _WHOLE
    return _loading(base, auto=_CLASSES.get(study.task.kind))


def _loading(base: dict[str, Any], *, auto: str | None = None) -> str:
    """Python that loads the base with the adapter on it."""
    kind, _, place = base["source"].partition(":")
    named = json.dumps(place if kind == "hub" else "the directory of the base model")
    revision = f', revision="{base["revision"]}"' if base["revision"] else ""
    given, names, rounding = f'dtype="{base["dtype"]}"', "AutoModelForCausalLM, AutoTokenizer", ""
    if auto is not None:
        heard = auto == "Audio"
        return _CLASSIFIER.format(
            base=named,
            revision=revision,
            given=f"{given}, output_loading_info=True" if heard else given,
            kind=auto,
            loaded="model, info" if heard else "model",
            then=_PROJECTOR if heard else "",
        )
    if "quantization" in base:
        settings = _BITSANDBYTES[base["quantization"]].format(base["dtype"])
        rounding = f"rounded = BitsAndBytesConfig({settings})\n"
        given, names = f"{given}, quantization_config=rounded", f"{names}, BitsAndBytesConfig"
    return f"""from peft import PeftModel
from transformers import {names}

base = {named}
{rounding}model = AutoModelForCausalLM.from_pretrained(base{revision}, {given})
model = PeftModel.from_pretrained(model, "the directory of this file")
tokenizer = AutoTokenizer.from_pretrained(base{revision})"""


def _code(text: str | None, before: str = "") -> str:
    if text is None:
        return ""
    return f"{before}`{printable(text).replace('`', '’').replace('|', '¦')}`"


def _privacy(study: Study) -> str:
    privacy = study.privacy
    if privacy is None:
        return "none: the adapter may reveal records"
    unit = {"record": "one record", "subject": "all records of one subject", "silo": "one silo"}
    against = "everybody"
    if privacy.noise == "distributed":
        against = f"everybody, of the silos at most {study.silos.colluders} together"
    return (
        f"(ε = {privacy.epsilon:g}, δ = {privacy.delta:g}) differential privacy of "
        f"{unit[privacy.unit]}, over all rounds, against {against}"
    )
