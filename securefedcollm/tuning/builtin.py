"""The built-in LLM and SLM: tiny Llama-style models, pretrained here on first use and cached.

Both read the public text of :class:`~securefedcollm.tuning.world.World`; the SLM is smaller and saw
little about some conditions, so that each has something to learn from the other. Pretraining takes
about a minute on one core and is deterministic on one machine; another processor may round
differently, so participants on different machines share the files instead of making them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F  # noqa: N812

from securefedcollm.tuning import world
from securefedcollm.tuning.making import Making, made, make_all, one_thread, place
from securefedcollm.tuning.recipe import Progress, quiet_transformers, silent, training_mode

Role = Literal["llm", "slm"]
ROLES: Final[tuple[Role, ...]] = ("llm", "slm")

_GENERATOR_VERSION = 1
_MAX_TOKENS = 64


@dataclass(frozen=True)
class Recipe:
    """Architecture and pretraining of one built-in model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    sentences: int
    rare_share: float
    rare: float
    batch_size: int
    learning_rate: float
    prompt_weight: float = 0.1  # of the words before the answer: grammar, and names drawn at random
    weight_decay: float = 0.01
    warmup_steps: int = 30


RECIPES: Final[dict[Role, Recipe]] = {
    "llm": Recipe(
        hidden=128,
        layers=2,
        intermediate=384,
        heads=4,
        sentences=45_000,
        rare_share=0.0,
        rare=1.0,
        batch_size=128,
        learning_rate=3e-3,
    ),
    "slm": Recipe(
        hidden=64,
        layers=2,
        intermediate=192,
        heads=4,
        sentences=60_000,
        rare_share=0.5,
        rare=0.02,
        batch_size=64,
        learning_rate=5e-3,
    ),
}


def builtin_models(
    role: Role,
    *,
    cache_dir: Path,
    seed: int = world.PUBLIC_SEED,
    progress: Progress = silent,
) -> tuple[Any, Any]:
    """The built-in model of ``role`` and the tokenizer, from the cache or made now.

    Returns:
        ``(LlamaForCausalLM float32 in evaluation mode, PreTrainedTokenizerFast)``.

    Raises:
        StateError: the cache cannot be written.
    """
    from transformers import LlamaForCausalLM

    directory = made(making_of(role, cache_dir, seed), progress)
    with quiet_transformers():
        model = LlamaForCausalLM.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
    return model.eval(), world.make_tokenizer()


def prepare(
    cache_dir: Path,
    progress: Progress = silent,
    *,
    seed: int = world.PUBLIC_SEED,
    context: BaseContext | None = None,
) -> None:
    """Make both models that are not cached yet; see :func:`.making.make_all`."""
    make_all([making_of(role, cache_dir, seed) for role in ROLES], progress, context)


def making_of(role: Role, cache_dir: Path, seed: int = world.PUBLIC_SEED) -> Making:
    """How the model of ``role`` is made."""
    shaped_by = [_GENERATOR_VERSION, world.VERSION, seed, asdict(RECIPES[role])]
    return Making(
        name=role,
        directory=place(cache_dir, f"hospital-{role}", shaped_by),
        steps=RECIPES[role].sentences,
        make=partial(_pretrained, role, seed),
        tokenizer=world.make_tokenizer,
    )


def _pretrained(role: Role, seed: int, progress: Progress) -> Any:
    return pretrain(role, seed=seed, progress=progress)


def pretrain(role: Role, *, seed: int, progress: Progress = silent) -> Any:
    """Train the model of ``role`` from scratch: one pass over the public text, one thread."""
    recipe = RECIPES[role]
    public = world.World(seed=0, public_seed=seed)
    text = torch.from_numpy(
        public.pretraining(recipe.sentences, rare=recipe.rare, rare_share=recipe.rare_share)
    )
    weights = torch.full((world.SENTENCE_TOKENS - 1,), recipe.prompt_weight)
    weights[world.PROMPT_TOKENS - 1 :] = 1.0  # the answer and the full stop
    steps = recipe.sentences // recipe.batch_size
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _untrained(recipe)
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
        )
        with training_mode(model, seed=seed):
            for step, batch in enumerate(torch.split(text, recipe.batch_size)[:steps]):
                for group in optimizer.param_groups:
                    group["lr"] = _scheduled(recipe, step, steps)
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
                losses = F.cross_entropy(logits.mT, batch[:, 1:], reduction="none")  # [B, 10]
                optimizer.zero_grad()
                torch.autograd.backward((losses * weights).sum(1).mean())
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                progress((step + 1) * recipe.batch_size, recipe.sentences, f"pretraining {role}")
    return model.eval()


def _scheduled(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to 2 %."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return recipe.learning_rate * warmup * (0.02 + 0.98 * cosine)


def _untrained(recipe: Recipe) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(architecture(recipe))


def architecture(recipe: Recipe) -> Any:
    """The ``LlamaConfig`` of a model made by ``recipe``."""
    from transformers import LlamaConfig

    tokenizer = world.make_tokenizer()
    return LlamaConfig(
        vocab_size=len(world.VOCABULARY),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=_MAX_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
