"""Which model families can be tuned, and how: tries each on a tiny random model of its own.

    python -m benchmarks.families --write      # docs/models.md
    python -m benchmarks.families --only gemma3_text --json

A model is made from the family's configuration, saved, loaded as a study's ``path:`` model is,
scored, tuned, tuned with record-level DP, distilled, and saved and loaded again as an adapter and
merged. "yes" means that it was done here; for DP also that no record's company moved a bit of its
gradient, at adapters that ``audit coupling`` would try. "prompt" and "prefix" are the same with
virtual tokens, without merging. The scores of a family that may be used are
compared with one plain forward pass of the library for each choice, short ones and ones beyond its
window.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from securefedcollm_audits.privacy.coupling import hostile_adapters
from torch import Tensor

from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.tuning.adapters import (
    AdapterLayout,
    attach,
    full_layout,
    layout_of,
    load_adapter,
    load_vector,
    merged,
    save_adapter,
)
from securefedcollm.tuning.distil import distil
from securefedcollm.tuning.independence import refuse_coupling
from securefedcollm.tuning.local import check_records, records_of, train_dp, train_plain
from securefedcollm.tuning.models import load_model, save_model
from securefedcollm.tuning.packing import ANY_LENGTH, check_model, row_limit
from securefedcollm.tuning.per_record import without_broken
from securefedcollm.tuning.plans import (
    DistilLossPlan,
    DistilPlan,
    LossPlan,
    Protection,
    TrainPlan,
)
from securefedcollm.tuning.prompts import attach_prompt, check_virtual
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, choice_scores, encode
from securefedcollm.tuning.recipe import evaluation_mode, inference_mode
from securefedcollm.tuning.virtual import virtual_count

PAGE: Final = Path(__file__).parents[1] / "docs" / "models.md"
COLUMNS: Final = ("tune", "DP", "distil", "save", "prompt", "prefix")
_VIRTUAL: Final = 4  # tokens
WINDOW: Final = 16
_HOSTILE: Final = 8  # adapters
_TOKENS, _POSITIONS = 48, 128
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": _TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": _POSITIONS,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD: Final = {"head_dim": 8}
_ALL_HEADS: Final = {"num_key_value_heads": 4}
"""For families whose heads share no keys and values: PEFT would believe the common sizes."""
_WINDOW: Final = {"sliding_window": WINDOW}
_EXPERTS: Final = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_LATENT: Final = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_STATE: Final = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}


class Family(NamedTuple):
    """One row: the differences from the common sizes, and what is adapted."""

    kind: str
    sizes: Mapping[str, Any] = MappingProxyType({})
    targets: str | list[str] = "all-linear"


_STATE_SPACE: Final = ["in_proj"]
FAMILIES: Final[dict[str, Family]] = {
    "Llama": Family("llama"),
    "Mistral": Family("mistral", _WINDOW),
    "Mixtral": Family("mixtral", _EXPERTS | _WINDOW),
    "Mixtral, its attention": Family("mixtral", _EXPERTS | _WINDOW, ["q_proj", "v_proj"]),
    "Qwen 2": Family("qwen2"),
    "Qwen 3": Family("qwen3", _HEAD),
    "Qwen 3 MoE": Family("qwen3_moe", _HEAD | _EXPERTS),
    "Qwen 3.5": Family("qwen3_5_text", _HEAD | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }),
    "Gemma": Family("gemma", _HEAD),
    "Gemma 2": Family("gemma2", _HEAD | _WINDOW),
    "Gemma 3": Family("gemma3_text", _HEAD | _WINDOW),
    "Phi 1 and 2": Family("phi", _ALL_HEADS),
    "Phi 3 and 4": Family("phi3", _WINDOW),
    "GPT-2": Family("gpt2", _ALL_HEADS),
    "GPT-Neo": Family("gpt_neo", _ALL_HEADS | {
        "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW,
    }),
    "GPT-NeoX, Pythia": Family("gpt_neox", _ALL_HEADS),
    "GPT-J": Family("gptj", _ALL_HEADS | {"rotary_dim": 8}),
    "GPT-OSS": Family("gpt_oss", _HEAD | _EXPERTS | _WINDOW),
    "OPT": Family("opt", _ALL_HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": Family("bloom", _ALL_HEADS | {"n_head": 4}),
    "MPT": Family("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "Falcon": Family("falcon"),
    "Falcon with ALiBi": Family("falcon", {"alibi": True}),
    "Mamba": Family("mamba", {"state_size": 4}, _STATE_SPACE),
    "Mamba 2": Family("mamba2", {
        "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8,
    }, _STATE_SPACE),
    "RWKV": Family("rwkv", {"attention_hidden_size": 32}),
    "RecurrentGemma": Family("recurrent_gemma", {"attention_window_size": WINDOW, "lru_width": 32}),
    "LFM2": Family("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Jamba": Family("jamba", {
        "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
        "use_mamba_kernels": False,
    }, ["q_proj", "v_proj", "in_proj"]),
    "Bamba": Family("bamba", _STATE | {"attn_layer_indices": [1]}),
    "Granite 4 hybrid": Family("granitemoehybrid", _STATE | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 0,
        "shared_intermediate_size": 48,
    }),
    "Granite": Family("granite"),
    "Granite MoE": Family("granitemoe", _EXPERTS),
    "OLMo": Family("olmo"),
    "OLMo 2": Family("olmo2"),
    "OLMo 3": Family("olmo3", _WINDOW),
    "OLMoE": Family("olmoe", _EXPERTS),
    "SmolLM3": Family("smollm3"),
    "StableLM": Family("stablelm"),
    "StarCoder 2": Family("starcoder2", _WINDOW),
    "Cohere": Family("cohere"),
    "Cohere 2": Family("cohere2", _WINDOW),
    "GLM": Family("glm", _HEAD),
    "GLM 4": Family("glm4", _HEAD),
    "EXAONE 4": Family("exaone4", _WINDOW),
    "Nemotron": Family("nemotron"),
    "ERNIE 4.5": Family("ernie4_5", _HEAD),
    "DeepSeek V3": Family("deepseek_v3", _LATENT | _EXPERTS | {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    }),
    "Llama 4": Family("llama4_text", _HEAD | _EXPERTS | {"intermediate_size_mlp": 48}),
    "XGLM": Family("xglm", _ALL_HEADS | {
        "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
    }),
    "BioGPT": Family("biogpt", _ALL_HEADS),
    "ModernBERT decoder": Family("modernbert-decoder", {"local_attention": WINDOW}),
    "BERT": Family("bert"),
    "RoBERTa": Family("roberta"),
}  # fmt: skip


class Verdict(NamedTuple):
    """The result for a family: "yes", or why not."""

    choices: str
    """How the choices of a question are scored."""
    done: dict[str, str]


def made(family: Family) -> Any:
    """A tiny random model of the family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family.kind, **{**_SIZES, **family.sizes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).float().eval()


def tokenizer() -> Any:
    """Words w0, w1, …; w7 is token 10."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(_TOKENS - 3))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<pad>", eos_token="</s>")


def questions() -> list[Question]:
    """Prompts that stay within the window and that pass it; choices of one to four words."""
    draw = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(0, _TOKENS - 3, count))

    return [
        Question(words(length), tuple(words(int(n)) for n in draw.integers(1, 5, 3)), 1)
        for length in (3, 6, 2 * WINDOW, 3 * WINDOW)
    ]


def one_pass_each(model: Any, asked: list[Question], words: Any) -> Tensor:
    """Scores by the library's own forward pass: no mask, no padding, nothing of ours."""
    rows = []
    with inference_mode(model):
        for question in asked:
            scores = []
            for choice in question.choices:
                prompt, rest = words([question.prompt, choice])["input_ids"]
                logits = model(input_ids=torch.tensor([prompt + rest]), use_cache=False).logits[0]
                log_p = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
                scores.append(log_p.gather(1, torch.tensor(rest)[:, None]).sum())
            rows.append(torch.stack(scores))
    return torch.stack(rows)


def verdict(family: Family) -> Verdict:
    """Try everything on a family."""
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        return _tried(family, Path(scratch))


def _tried(family: Family, home: Path) -> Verdict:
    asked = questions()
    try:
        save_model(made(family), tokenizer(), home / "base")
        loaded = load_model(f"path:{home / 'base'}")
        check_model(loaded.model, "model")
    except SecureFedCoLLMError as error:
        return Verdict(f"no: {error}".replace(f"path:{home / 'base'}: ", ""), {})
    words = tokenizer()  # the library would make these few words into the family's own class
    data = encode(asked, words, _POSITIONS)
    with inference_mode(loaded.model):
        scores = choice_scores(loaded.model, data)
    wanted = one_pass_each(loaded.model, asked, words)
    if not torch.allclose(scores, wanted, atol=1e-3, rtol=1e-4):
        return Verdict(f"WRONG by {(scores - wanted).abs().max():.3g}", {})
    limit = row_limit(loaded.model)
    how = {0: "a row each", ANY_LENGTH: "packed"}.get(limit, "packed, within the window")
    tasks: dict[str, Callable[[], None]] = {
        "tune": lambda: _tune(_adapted(home, family), data),
        "DP": lambda: _tune_privately(_adapted(home, family), data),
        "distil": lambda: _distil(_adapted(home, family), _adapted(home, family), data),
        "save": lambda: _save(home, lambda base: _attached(base, family), data),
        "prompt": lambda: _virtual(home, "prompt", data),
        "prefix": lambda: _virtual(home, "prefix", data),
    }
    done = {}
    for name, task in tasks.items():
        try:
            task()
            done[name] = "yes"
        except SecureFedCoLLMError as error:
            done[name] = f"no: {error}"
    return Verdict(how, done)


def _base(home: Path) -> Any:
    return load_model(f"path:{home / 'base'}").model


def _attached(base: Any, family: Family) -> Any:
    return attach(base, rank=2, targets=family.targets, seed=1)


def _adapted(home: Path, family: Family) -> Any:
    return _attached(_base(home), family)


def _virtual(home: Path, method: Literal["prompt", "prefix"], data: EncodedQuestions) -> None:
    """All of it with virtual tokens, each time with fresh ones."""

    def attached(base: Any) -> Any:
        return attach_prompt(base, method=method, tokens=_VIRTUAL, seed=1)

    check_virtual(attached(_base(home)), "model")
    _tune(attached(_base(home)), data)
    _distil(attached(_base(home)), attached(_base(home)), data)
    _save(home, attached, data)
    _tune_privately(attached(_base(home)), data)


def _trained(model: Any) -> AdapterLayout:
    """The layout of what is tuned."""
    return full_layout(model) if virtual_count(model) else layout_of(model, "ffa-lora")


def _tune(model: Any, data: EncodedQuestions) -> None:
    layout = _trained(model)
    plan = TrainPlan(steps=2, batch_size=4, learning_rate=0.01)
    train_plain(model, layout, data, plan, seed=1)


def _tune_privately(model: Any, data: EncodedQuestions) -> None:
    refuse_coupling(model, "models.slm", _POSITIONS)
    loss = LossPlan(micro_batch=4)
    check_records(model, loss)
    train_dp(
        model,
        _trained(model),
        data,
        TrainPlan(steps=1, batch_size=4, learning_rate=0.01, loss=loss),
        Protection(noise_multiplier=1.0, clip_norm=1.0),
        noise=NoiseSource(),
    )
    _uncoupled(model, data)


def _uncoupled(model: Any, data: EncodedQuestions) -> None:
    """Refuse a family in which a record's company moves a bit of its gradient.

    Adversary: the server, which chooses the adapter. Two copies of each record share its pass.
    """
    layout, draw = _trained(model), np.random.default_rng(0)
    start = np.zeros(layout.size, dtype=np.float32)
    for adapter in hostile_adapters(start, layout, _HOSTILE, None, draw):
        load_vector(model, layout, adapter)
        for first in range(len(data)):
            others = [row for row in range(len(data)) if row != first]
            companies = ([], [first], others, [*reversed(others), first, *others])
            if len({_gradient_of(model, data, first, company) for company in companies}) > 1:
                raise ConfigError("one record moves the last bits of another's gradient")


def _gradient_of(model: Any, data: EncodedQuestions, first: int, company: list[int]) -> bytes:
    """The bits of record ``first``'s gradient, computed with ``company``."""
    part = data.select(torch.tensor([*company, first]))
    place, layout = len(company), _trained(model)
    with evaluation_mode(model):
        records = records_of(model, layout, part, LossPlan(micro_batch=16))
        for rows, gradients in records.of_records(np.arange(len(part))):
            if place in rows.tolist():
                at = rows.tolist().index(place)
                own = [gradient[at].double().numpy().reshape(1, -1) for gradient in gradients]
                return np.concatenate(without_broken(own)[0], axis=1).tobytes()
    raise AssertionError("a record has no gradient")


def _distil(llm: Any, slm: Any, data: EncodedQuestions) -> None:
    layouts = _trained(llm), _trained(slm)
    for loss in (DistilLossPlan(over="choices"), DistilLossPlan(over="answer")):
        plan = DistilPlan(
            steps=1,
            batch_labelled=2,
            batch_unlabelled=0,
            learning_rate_llm=0.01,
            learning_rate_slm=0.01,
            loss=loss,
        )
        distil((llm, slm), layouts, (data, data), plan, seed=1)


def _save(home: Path, attached: Callable[[Any], Any], data: EncodedQuestions) -> None:
    """The adapter, and the model if it can be merged, give the same results after loading."""
    model = attached(_base(home))
    layout = full_layout(model)
    load_vector(model, layout, np.random.default_rng(0).normal(scale=0.1, size=layout.size))
    save_adapter(model, home / "adapter")

    def scores(other: Any) -> Tensor:
        with inference_mode(other):
            return choice_scores(other, data)

    wanted = scores(model)
    torch.testing.assert_close(scores(load_adapter(_base(home), home / "adapter")), wanted)
    if virtual_count(model):
        return
    save_model(merged(_base(home), home / "adapter"), tokenizer(), home / "merged")
    again = load_model(f"path:{home / 'merged'}").model
    torch.testing.assert_close(scores(again), wanted, atol=1e-3, rtol=1e-3)


@contextmanager
def _quiet() -> Iterator[None]:
    kept = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(kept)


def row(name: str, family: Family, found: Verdict) -> str:
    """A line of the page's table."""
    reasons = [found.choices] if found.choices.startswith("no: ") else []
    reasons += sorted({_reason(how, what) for how, what in found.done.items() if what != "yes"})
    note = "; ".join(reason.removeprefix("no: ").replace("|", "/") for reason in reasons)
    if isinstance(family.targets, list):
        names = ", ".join(f"`{target}`" for target in family.targets)
        note = f"adapter on {names}" + (f"; {note}" if note else "")
    cells = [found.done.get(column, "no").partition(":")[0] for column in COLUMNS]
    choices = found.choices.partition(":")[0]
    return f"| {name} | `{family.kind}` | {choices} | {' | '.join(cells)} | {note} |"


def _reason(how: str, what: str) -> str:
    """Why something was refused; for virtual tokens, which kind."""
    why = what.removeprefix("no: ")
    return f"{how}: {why.removeprefix('model: ')}" if how in {"prompt", "prefix"} else why


def table(found: dict[str, Verdict]) -> list[str]:
    """The page's table."""
    head = ["family", "`model_type`", "choices", *COLUMNS, "note"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return lines + [row(name, FAMILIES[name], what) for name, what in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", metavar="FAMILY", help="a name or model_type")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    parser.add_argument("--json", action="store_true", help="print JSON (the only output there is)")
    given = parser.parse_args()
    found = {}
    for name, family in FAMILIES.items():
        if not given.only or {name, family.kind} & set(given.only):
            print(name, file=sys.stderr)
            found[name] = verdict(family)
    lines = table(found)
    if given.write:
        text = PAGE.read_text(encoding="utf-8")
        start = text.index("| family |")
        end = text.index("\n\n", start)  # the page has other tables
        PAGE.write_text(text[:start] + "\n".join(lines) + text[end:], encoding="utf-8")
    if given.json:
        print(json.dumps({name: what._asdict() for name, what in found.items()}))
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
