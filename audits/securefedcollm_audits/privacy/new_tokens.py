"""New-token canaries: what the tuned model gives away by itself, without any update.

Each canary is a record of the silo whose right answer is a token that no text has: it is added to
the model's vocabulary for this audit, one for each canary (Panda et al., "Privacy auditing of large
language models", 2025). Nothing else can teach the model that answer, so its loss tells better than
that of any sentence whether the canary was in. The attacker has the base model and the final
adapter, like everybody who downloads them, and scores a canary by how much its loss fell.

Imports torch.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch

from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.plan import silo_names
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import Progress, Vector, silent
from securefedcollm.study import Study
from securefedcollm.study.config import Model
from securefedcollm.tuning.adapters import load_vector
from securefedcollm.tuning.models import load_model, save_model
from securefedcollm.tuning.per_record import question_losses
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions
from securefedcollm.tuning.recipe import inference_mode
from securefedcollm_audits.privacy.finding import Finding
from securefedcollm_audits.privacy.lower_bounds import CONFIDENCE, Scores, rate_interval
from securefedcollm_audits.privacy.one_run import Played, alone, fitting, judge, refuse_distributed

CANARIES: Final = 500
FALSE_ALARMS: Final = 0.01
_BATCH: Final = 64


def audit(
    study: Study,
    *,
    data: Path | None = None,
    canaries: int = CANARIES,
    seed: int | None = None,
    progress: Progress = silent,
) -> Finding:
    """Tune one silo of the study with new-token canaries, and guess from losses which were in.

    Args: as of :func:`securefedcollm_audits.privacy.one_run.audit`.

    Raises:
        ConfigError: the study's noise is not added inside a silo, or the silo has few records.
    """
    refuse_distributed(study, "canaries")
    played = train(study, data, canaries, seed, progress)
    what = f"the model after {study.rounds} rounds of one silo's own tuning"
    finding = judge(study, "canaries", played, what)
    found = found_at(played.scores[played.present], played.scores[~played.present])
    return msgspec.structs.replace(finding, figures=finding.figures | found)


def found_at(inside: Scores, outside: Scores) -> dict[str, float]:
    """Share of canaries found by the threshold that :data:`FALSE_ALARMS` of the others pass.

    The intervals are Clopper and Pearson's, each for this threshold as if it had been given: it was
    read off a few hundred scores, and its own rate of false alarms is no better known than that.
    """
    threshold = np.quantile(outside, 1.0 - FALSE_ALARMS)
    caught, alarms = int((inside > threshold).sum()), int((outside > threshold).sum())
    tpr = rate_interval(caught, len(inside), CONFIDENCE)
    fpr = rate_interval(alarms, len(outside), CONFIDENCE)
    return {
        "tpr at 1 % fpr": caught / len(inside),
        "tpr at this threshold, at least": tpr[0],
        "tpr at this threshold, at most": tpr[1],
        "fpr at this threshold, at least": fpr[0],
        "fpr at this threshold, at most": fpr[1],
    }


def train(
    study: Study, data: Path | None, canaries: int, seed: int | None, progress: Progress
) -> Played:
    """The one run.

    Raises:
        ConfigError: the study's models read no tokens.
    """
    if study.task.senses:
        raise ConfigError(
            "this study's models see or hear, and read no tokens",
            where="task.kind",
            hint="`audit one-run` takes it, with noise as canaries",
        )
    name = silo_names(study)[0]
    records = list(deal(study, data).silos[name])
    draw = random.Random(seed)  # noqa: S311 - chooses canaries; noise and keys are the product's
    draw.shuffle(records)
    count = fitting(canaries, len(records))
    with tempfile.TemporaryDirectory(prefix="securefedcollm-") as directory:
        words = [f"canary{i:05d}" for i in range(count)]
        widened = _with_tokens(study, words, data, Path(directory), draw.randrange(2**32))
        made = [_canary(records[number], number, word) for number, word in enumerate(words)]
        present = np.array([draw.random() < 0.5 for _ in made])
        inside = [question for question, there in zip(made, present, strict=True) if there]
        inside = records[count:] + inside
        silo = SiloTuning(widened, name, inside, data=data, progress=progress, alone=True)
        attacker = Tuned.load(widened, widened.models.slm, data=data)
        known = attacker.encode(made)
        adapter = silo.adapter()
        before = _losses(attacker, adapter, known)
        for round_ in range(study.rounds):
            silo.fit(adapter, round_, progress)
            adapter = silo.adapter()
    fell = before - _losses(attacker, adapter, known)
    return Played(fell, present, tuple(silo.events()) * study.rounds)


def _canary(question: Question, number: int, word: str) -> Question:
    choices = (word, *question.choices[1:])
    return replace(question, choices=choices, answer=0, subject=alone(question, number))


def _with_tokens(
    study: Study, words: list[str], data: Path | None, directory: Path, seed: int
) -> Study:
    """The study with a copy of its small model, in ``directory``, that knows ``words`` as tokens.

    Their embeddings are drawn like those that are there.
    """
    from tokenizers import AddedToken

    spec = study.models.slm
    loaded = load_model(
        spec.source,
        revision=spec.revision,
        sha256=spec.sha256,
        dtype=spec.dtype,
        base_dir=data or Path(),
    )
    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in words])
    rows = len(tokenizer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows, mean_resizing=False)
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        for weight in tables:
            old, new = weight[: rows - len(words)], weight[rows - len(words) : rows]
            new.copy_(torch.randn_like(new.float()) * old.float().std(0) + old.float().mean(0))
    save_model(model, tokenizer, directory / "slm")
    widened = Model(
        source=f"path:{directory / 'slm'}", dtype=spec.dtype, quantization=spec.quantization
    )
    models = msgspec.structs.replace(study.models, slm=widened)
    return msgspec.structs.replace(study, models=models)


def _losses(tuned: Tuned, adapter: Vector, data: EncodedQuestions) -> Scores:
    """Every question's loss under ``adapter``: float64 [m]."""
    load_vector(tuned.model, tuned.broadcast_layout(), adapter)
    study = tuned.study
    with inference_mode(tuned.model):
        parts = [
            question_losses(tuned.model, data.select(rows), study.local.loss, tuned.scoring)
            for rows in torch.split(torch.arange(len(data)), _BATCH)
        ]
    found: Scores = torch.cat(parts).double().numpy()
    return found
