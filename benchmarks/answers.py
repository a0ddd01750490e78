"""What questions to records are worth: ``python -m benchmarks.answers --json``.

The embedded world of ``configs/answers.yaml``: four hospitals, 3,000 records each, and 64 house
rules of which each hospital knows a quarter. The questions are the world's tests; no record asks
one of them. ``private`` ones are about house rules, which no base model knows; ``general`` ones
about public knowledge. Each row is a way to answer:

* ``slm``, ``llm``: the untuned model alone.
* ``own``: a hospital's own records vote, without noise; the mean over the hospitals.
* ``documents``: the best five of all hospitals' house rules (``mode: documents``, by plain search,
  which finds the same) vote for the choice that their words name, each with its score.
* ``documents, SLM reads``: the SLM answers with the best rule before the question.
* ``answers``: all hospitals' records vote, with the noise of ``mode: answers`` at ε. The integers
  and the noise are the product's own, every record answers ``retrieval.questions`` times at most,
  and only the masks are left out, since they cancel in the sum.
* ``answers + LLM``: the same, mixed with the asker's LLM (``Tally.mixed``).
* ``central``: all records in one place vote, without noise.
* ``central, SLM reads``: the SLM answers with the best record before the question.

``--choose`` compares encoder layers and thresholds on the world of another seed instead, and
``--whole N`` also asks N questions through the whole product (masks, ledger, evidence) for its time
and bytes, and for how many of its choices are right.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks._machine import machine
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.questions.polls import votes_of
from securefedcollm.federation.questions.records import embed_alone, index_records
from securefedcollm.federation.questions.shelves import passages_of
from securefedcollm.federation.questions.space import Space, plan_of, space_of
from securefedcollm.federation.tuned import Tuned
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.votes import Tally, Votes
from securefedcollm.retrieval.nearest import RecordIndex
from securefedcollm.simulation.polling import Polls
from securefedcollm.study import Study, load_study
from securefedcollm.tuning.question import Question

Floats = npt.NDArray[np.float64]
Shares = npt.NDArray[np.float64]
STUDY = "configs/answers.yaml"
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a 95 % interval of the mean over so many seeds."""


class World(NamedTuple):
    """One seed's world, embedded."""

    study: Study
    space: Space
    tests: list[Question]
    queries: Floats
    records: Mapping[str, Sequence[Question]]
    indexes: Mapping[str, RecordIndex]

    @classmethod
    def of(cls, overrides: Sequence[str], every: int) -> World:
        study = load_study(STUDY, list(overrides))
        space = space_of(study)
        dealt = deal(study, None)
        tests = list(dealt.test)[::every]
        queries = np.array([embed_alone(space, question.prompt) for question in tests])
        indexes = {name: index_records(space, own) for name, own in dealt.silos.items()}
        return cls(study, space, tests, queries, dealt.silos, indexes)


class Ballots(NamedTuple):
    """Of each silo's records: which a question retrieves, and for which choice they vote."""

    alike: Mapping[str, npt.NDArray[np.bool_]]  # [questions, n]
    votes: Mapping[str, npt.NDArray[np.int64]]  # [questions, n]: -1 for none

    @classmethod
    def of(cls, world: World, threshold: float) -> Ballots:
        alike, votes = {}, {}
        for name, own in world.records.items():
            labels = np.array([q.choices[q.answer or 0] for q in own])
            index = world.indexes[name]
            alike[name] = np.array([index.retrieved(query, threshold) for query in world.queries])
            votes[name] = np.array([_places(labels, q.choices) for q in world.tests])
        return cls(alike, votes)

    def counts(self, name: str, at: int, allowed: npt.NDArray[np.bool_], choices: int) -> Floats:
        chosen = self.votes[name][at][self.alike[name][at] & allowed]
        return np.bincount(chosen[chosen >= 0], minlength=choices).astype(np.float64)


def _places(labels: npt.NDArray[np.str_], choices: Sequence[str]) -> npt.NDArray[np.int64]:
    found = np.full(len(labels), -1)
    for place, choice in enumerate(choices):
        found[labels == choice] = place
    return found


def noised(world: World, ballots: Ballots, epsilon: float) -> tuple[list[Tally], dict[str, float]]:
    """The answers to all questions in turn, at ε, and what the records have paid at the end."""
    study = load_study(STUDY, _tree_overrides(world.study, epsilon))
    most, left = plan_of(study).questions, {}
    for name, own in world.records.items():
        left[name] = np.full(len(own), most)
    tallies, mechanisms = [], dict[int, Votes]()
    retrieved = 0
    for at, question in enumerate(world.tests):
        size = len(question.choices)
        made = mechanisms.setdefault(size, votes_of(study, size))
        total = np.zeros(size, dtype=np.int64)
        for name in world.records:
            allowed = left[name] > 0
            content = ballots.counts(name, at, allowed, size)
            paying = ballots.alike[name][at] & allowed
            left[name][paying] -= 1
            retrieved += int(paying.sum())
            total += made.protect(content, NoiseSource())
        tallies.append(made.read(total, len(world.records)))
    spent = np.concatenate([most - counts for counts in left.values()])
    return tallies, {
        "sigma": tallies[0].sigma,
        "retrieved": retrieved / len(world.tests),
        "spent": float((spent == most).mean()),
        "most_asked": int(spent.max()),
    }


def _tree_overrides(study: Study, epsilon: float) -> list[str]:
    plan = plan_of(study)
    return [
        f"seed={study.seed}",
        f"retrieval.epsilon={epsilon}",
        f"retrieval.questions={plan.questions}",
        f"retrieval.votes={plan.votes}",
        f"retrieval.threshold={plan.threshold}",
    ]


def right(world: World, chosen: Sequence[int | None]) -> dict[str, float]:
    """Accuracy by group. None: no answer, which counts as a guess, right once in as many as there
    are choices."""
    found: dict[str, list[float]] = {}
    for question, choice in zip(world.tests, chosen, strict=True):
        guess = 1.0 / len(question.choices)
        found.setdefault(question.group, []).append(
            guess if choice is None else float(choice == question.answer)
        )
    return {group: float(np.mean(values)) for group, values in found.items()}


def _best(counts: Floats) -> int | None:
    return int(counts.argmax()) if counts.max() > 0 else None


def plain_votes(world: World, ballots: Ballots, names: Sequence[str]) -> list[int | None]:
    """The choice of these silos' records together, without noise."""
    found = []
    for at, question in enumerate(world.tests):
        size = len(question.choices)
        every = [
            ballots.counts(name, at, np.ones(len(world.records[name]), dtype=np.bool_), size)
            for name in names
        ]
        found.append(_best(np.sum(every, axis=0)))
    return found


def model_shares(model: Tuned, questions: Sequence[Question]) -> Shares:
    """A model's probabilities of the choices, [questions, choices]."""
    scores = model.answers(model.encode(questions)).scores
    assert scores is not None
    raised = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    shares: Shares = raised / raised.sum(axis=1, keepdims=True)
    return shares


def document_rows(world: World, slm: Tuned, most: int = 5) -> dict[str, dict[str, float]]:
    """Answers from the house rules."""
    documents = load_study(
        "configs/retrieval.yaml", [f"seed={world.study.seed}"]
    )  # another encoder layer may suit documents better
    space = space_of(documents)
    passages = [
        passage for name in world.records for passage in passages_of(documents, [f"builtin:{name}"])
    ]
    shelf = np.array([embed_alone(space, passage.text) for passage in passages])
    chosen: list[int | None] = []
    read = []
    for question in world.tests:
        scores = shelf @ embed_alone(space, question.prompt)
        best = np.argsort(-scores, kind="stable")[:most]
        votes = np.zeros(len(question.choices))
        for at in best:
            words = set(passages[at].text.split())
            for place, choice in enumerate(question.choices):
                votes[place] += float(scores[at]) * (choice in words) / (1 + list(best).index(at))
        chosen.append(_best(votes))
        read.append(_before(passages[best[0]].text, question))
    reads = model_shares(slm, read).argmax(axis=1).tolist()
    return {
        "documents": right(world, chosen),
        "documents, SLM reads": right(world, reads),
    }


def _before(text: str, question: Question) -> Question:
    return Question(f"{text}\n{question.prompt}", question.choices, question.answer, question.group)


def read_records(world: World, slm: Tuned) -> dict[str, float]:
    """The SLM with the most alike record of all silos before the question."""
    asked = []
    for query, question in zip(world.queries, world.tests, strict=True):
        best = max(
            (int(found.max()), name, int(found.argmax()))
            for name, found in (
                (name, index.similarities(query)) for name, index in world.indexes.items()
            )
        )
        record = world.records[best[1]][best[2]]
        asked.append(_before(f"{record.prompt} {record.choices[record.answer or 0]} .", question))
    return right(world, model_shares(slm, asked).argmax(axis=1).tolist())


def measure(world: World, epsilons: Sequence[float], weight: float) -> dict[str, Any]:
    """All rows of one seed."""
    plan = plan_of(world.study)
    assert plan.threshold is not None
    assert world.study.models.llm is not None
    ballots = Ballots.of(world, plan.threshold)
    slm = Tuned.load(world.study, world.study.models.slm, data=None)
    llm = Tuned.load(world.study, world.study.models.llm, data=None)
    alone = {
        "slm": model_shares(slm, world.tests),
        "llm": model_shares(llm, world.tests),
    }
    rows = {name: right(world, found.argmax(axis=1).tolist()) for name, found in alone.items()}
    own = [right(world, plain_votes(world, ballots, [name])) for name in world.records]
    rows["own"] = {group: float(np.mean([one[group] for one in own])) for group in own[0]}
    rows |= document_rows(world, slm)
    facts = {}
    for epsilon in epsilons:
        tallies, facts[f"{epsilon:g}"] = noised(world, ballots, epsilon)
        rows[f"answers, ε = {epsilon:g}"] = right(world, [tally.choice for tally in tallies])
        mixed = [t.mixed(p, weight) for t, p in zip(tallies, alone["llm"], strict=True)]
        rows[f"answers + LLM, ε = {epsilon:g}"] = right(
            world, [int(shares.argmax()) for shares in mixed]
        )
    rows["central"] = right(world, plain_votes(world, ballots, list(world.records)))
    rows["central, SLM reads"] = read_records(world, slm)
    return {"seed": world.study.seed, "rows": rows, "noise": facts}


def choose(seed: int, every: int, epsilons: Sequence[float], sets: Sequence[str]) -> dict[str, Any]:
    """Settings compared on the world of ``seed``: private accuracy, and weights of the mixture."""
    found, weights = [], []
    for layer in (0, 1, 2):
        overrides = [f"seed={seed}", *sets, f"retrieval.encoder.layer={layer}"]
        world = World.of(overrides, every)
        assert world.study.models.llm is not None
        prior = model_shares(
            Tuned.load(world.study, world.study.models.llm, data=None), world.tests
        )
        for threshold in (0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9):
            ballots = Ballots.of(world, threshold)
            row: dict[str, Any] = {"layer": layer, "threshold": threshold}
            for epsilon in epsilons:
                tallies, facts = noised(world, ballots, epsilon)
                row[f"{epsilon:g}"] = right(world, [t.choice for t in tallies])["private"]
                for weight in (0.3, 0.5, 0.7, 0.8, 0.9):
                    mixed = [
                        int(t.mixed(p, weight).argmax())
                        for t, p in zip(tallies, prior, strict=True)
                    ]
                    weights.append(
                        {"layer": layer, "threshold": threshold, "epsilon": epsilon}
                        | {"weight": weight, **right(world, mixed)}
                    )
            found.append(row | facts)
            print(row, facts, file=sys.stderr)
    return {"settings": found, "weights": weights}


def whole(world: World, count: int) -> dict[str, float]:
    """``count`` private questions through the whole product."""
    asked = [question for question in world.tests if question.group == "private"][:count]
    seconds, frames, good = [], [], 0
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        polls = Polls(
            world.study,
            records=world.records,
            asker="server",
            directory=Path(place) / "run",
            space=world.space,
        )
        opened = time.perf_counter() - start
        with polls:
            for question in asked:
                found = polls.ask(question.prompt, question.choices)
                seconds.append(found.seconds)
                frames.append(found.opinion.sent + found.opinion.received)
                good += found.opinion.tally.choice == question.answer
    return {
        "questions": count,
        "right": good / count,
        "open_s": opened,
        "first_s": seconds[0],
        "median_s": float(np.median(seconds)),
        "last_s": seconds[-1],
        "bytes": float(np.mean(frames)),
    }


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Row → group → [mean, half of the 95 % interval of the mean over seeds]."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in results[0]["rows"]:
        for group in results[0]["rows"][row]:
            values = [result["rows"][row][group] for result in results]
            half = 0.0
            if len(values) > 1:
                half = _T95.get(len(values), 1.96) * float(np.std(values, ddof=1))
                half /= math.sqrt(len(values))
            found.setdefault(row, {})[group] = [float(np.mean(values)), half]
    return found


def markdown(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The table of ``docs/results.md``."""
    groups = list(next(iter(found.values())))
    lines = ["| answered by | " + " | ".join(groups) + " |", "| --- |" + " --- |" * len(groups)]
    for row, values in found.items():
        cells = [f"{100 * values[g][0]:.1f} ± {100 * values[g][1]:.1f}" for g in groups]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[2026, 2027, 2028])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 3.0, 1.0])
    parser.add_argument("--weight", type=float, default=0.5, help="of the votes, in the mixture")
    parser.add_argument("--every", type=int, default=1, help="ask one question in so many")
    parser.add_argument("--choose", type=int, metavar="SEED", help="compare settings instead")
    parser.add_argument("--whole", type=int, default=0, metavar="N")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--markdown", action="store_true", help="print the table alone")
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    plan = parser.parse_args()
    start = time.process_time()
    report: dict[str, Any]
    if plan.choose is not None:
        report = choose(plan.choose, plan.every, plan.epsilon, plan.sets)
    else:
        results, asked = [], None
        for seed in plan.seeds:
            world = World.of([f"seed={seed}", *plan.sets], plan.every)
            results.append(measure(world, plan.epsilon, plan.weight))
            if plan.whole and asked is None:
                asked = whole(world, plan.whole)
        report = {"seeds": results, "mean": summary(results), "whole": asked}
        if plan.markdown:
            print(markdown(report["mean"]))
            return
    report |= {"cpu_s": time.process_time() - start, "machine": machine("torch", "numpy")}
    json.dump(report, sys.stdout, indent=None if plan.json else 2, ensure_ascii=False)
    print()


if __name__ == "__main__":
    main()
