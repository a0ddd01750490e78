"""What a study implies, as data and as sentences: for ``study check``."""

from __future__ import annotations

import math
from typing import Any

from securefedcollm.privacy.shown import up


def derived(study: Any, values: int | None = None) -> dict[str, Any]:
    """The consequences of a study, as data and as sentences."""
    from securefedcollm.study import digest

    n, c = study.silos.count, study.silos.colluders
    field = study.field
    privacy = study.privacy
    reading = {
        "study": f"{study.study}, digest sha256:{digest(study).hex()}",
        "models": f"LLM {study.models.llm.source}, SLM {study.models.slm.source}"
        if study.models.llm
        else f"{study.models.slm.source}, tuned by the silos; the server has none of its own",
        "silos": f"{n}, of which {c} may collude with the server",
        "a sum opens with": _opens_with(study),
        **({"graph": _graph(study)} if study.graph else {}),
        **({"authority": _authority(study)} if study.scheme == "ckks-authority" else {}),
        "adapter": "none: the silos train with their own code"
        if study.task.kind == "own"
        else study.adapter.summary,
        "ring": f"{_packing(study)}, integers within ±{field.bound}, "
        f"resolution {study.aggregation.clip_norm / field.bound:.2g}",
        **({"decryptions tell": _advantage(study, values)} if study.ring else {}),
        "privacy": (
            f"(ε = {privacy.epsilon:g}, δ = {privacy.delta:g}) per {privacy.unit}, noise "
            f"{privacy.noise}, all {study.rounds * study.tuning_sums} "
            f"{'steps' if study.joint else 'rounds'} together"
            if privacy
            else "no differential privacy: the global adapter may reveal records"
        ),
        **({"goes on": _chain(study)} if study.continues else {}),
        **({"validation": _validation(study)} if study.validation else {}),
        **({"records answer": _answers(study)} if _asks_records(study) else {}),
        **({"server": _server(study)} if study.server else {}),
        **({"distillation": study.distillation.loss} if study.models.llm else {}),
    }
    return {
        "study": study.study,
        "digest": digest(study).hex(),
        "threshold": study.threshold,
        "minimum": study.minimum,
        "field_bits": field.bits,
        "fields_per_word": field.per_word,
        "bound": field.bound,
        "ckks": _ring_facts(study, values),
        "graph": _graph_facts(study),
        "reading": reading,
    }


def _graph(study: Any) -> str:
    """Who masks with whom, and what a server could hope for in one attempt and in the run."""
    from securefedcollm.aggregation.header import MOST_ATTEMPTS

    graph, found = study.graph, study.graph_bounds
    whole = found.whole_run(MOST_ATTEMPTS, study.sums)
    least = study.noise_shares() - study.silos.colluders
    return (
        f"each silo draws {graph.neighbours} neighbours, {graph.shares} of which rebuild its "
        f"secrets. Chances in one attempt, at most: a silo draws too many colluders "
        f"{_chance(found.corrupt)}, too many of its neighbours are fooled about the survivors "
        f"{_chance(found.lists)}, the server cuts the survivors in two {_chance(found.cut)}. One "
        f"of these in the whole run, of {study.sums} sums with up to {MOST_ATTEMPTS} attempts: "
        f"{_chance(whole)}. By honest losses alone a silo loses too many neighbours, and an "
        f"attempt fails: {_chance(found.dropped)}. A sum has at least {least} honest silos"
    )


def _chance(bits: float) -> str:
    return "never" if bits == -math.inf else f"2^{bits:.1f}"


def _graph_facts(study: Any) -> dict[str, Any] | None:
    """The graph's sizes, and log2 of the bounds; None where it cannot happen."""
    from securefedcollm.aggregation.header import MOST_ATTEMPTS

    if study.graph is None:
        return None
    found = study.graph_bounds
    bounds = {
        "corrupt": found.corrupt,
        "lists": found.lists,
        "cut": found.cut,
        "dropped": found.dropped,
        "whole_run": found.whole_run(MOST_ATTEMPTS, study.sums),
    }
    return {
        "neighbours": study.graph.neighbours,
        "shares": study.graph.shares,
        "hidden": found.hidden,
        "attempts": MOST_ATTEMPTS,
        "sums": study.sums,
        **{name: None if bits == -math.inf else bits for name, bits in bounds.items()},
    }


def _validation(study: Any) -> str:
    """What is set aside, what noise its counts have, and what they cost."""
    from securefedcollm.federation.plan import counting
    from securefedcollm.privacy.accounting import claim

    share, counts = study.validation.share, counting(study)
    said = f"{share:.0%} of each silo's {study.subject or 'record'}s, after every round"
    if study.privacy is None:
        return f"{said}; counts without noise, which may reveal records"
    spent = claim(counts.events(study.rounds), study.privacy.delta).epsilon
    sigma = counts.read((0, 0), study.silos.count).sigma
    return (
        f"{said}; noise of σ = {sigma:.2g} on the counts of all {study.silos.count} silos. What is "
        f"set aside pays ε = {up(spent)} for all rounds, and nothing for the tuning"
    )


def spending(study: Any, release: Any) -> tuple[dict[str, float], str]:
    """ε that is charged for a study's tuning, and ε if all goes well: as data and as a sentence."""
    from securefedcollm.privacy.gap import gap_of

    privacy, silos = study.privacy, study.silos.count
    found = gap_of(release, silos, privacy.delta, privacy.epsilon)
    hoped = "without the ledger's reserve of δ"
    if privacy.noise == "distributed":
        hoped = f"if all {silos} silos are in every sum and nobody chose by what was released"
        hoped += "; no ledger can tell on a graph" if study.graph else ""
    said = f"ε = {up(found.charged)} at worst, which is charged; {up(found.hoped)} {hoped}"
    return found._asdict(), said


def _asks_records(study: Any) -> bool:
    return study.retrieval is not None and study.retrieval.mode == "answers"


def _answers(study: Any) -> str:
    """What members' questions to records cost a record, and the noise on the votes."""
    from securefedcollm.federation.questions.planning import answer_plans

    (plan,) = answer_plans(study)
    return (
        f"members' questions, which the silos learn: {plan.questions} of them cost a record ε = "
        f"{plan.epsilon:g} at δ = {plan.delta:g}, from the budget that also pays for its tuning; "
        f"noise of σ = {plan.sigma:.2g} votes on each choice"
    )


def _server(study: Any) -> str:
    """What happens to an opened mean before distillation, in order."""
    outer, central = study.server.outer, study.server.central
    parts = ["adds the mean to the adapter (FedAvg)"]
    if outer:
        parts = [
            f"takes a step of {outer.optimizer} on the mean, learning rate "
            f"{outer.learning_rate:g}, momentum {outer.momentum:g}"
        ]
    if central:
        parts.append(f"then {central.steps} steps of {central.batch_size} public rows")
    return ", ".join(parts) + "; no ε"


def _chain(study: Any) -> str:
    links = [f"{link.run} ({link.study[:16]}…)" for link in study.continues.earlier]
    apart = "; the new adapter keeps apart from theirs" if study.continues.orthogonal else ""
    return f"from what these runs released, by their studies: {', '.join(links)}{apart}"


def _opens_with(study: Any) -> str:
    tolerated = f"({study.silos.count - study.quorum} dropout(s) tolerated per round)"
    if study.ring is None:
        if study.graph:
            shares = f"{study.graph.shares} of the {study.graph.neighbours} neighbours of each"
            return (
                f"{study.quorum} survivors, {study.threshold} of them agreeing and {shares} "
                f"unmasking {tolerated}"
            )
        return f"{study.minimum} survivors, {study.threshold} of them unmasking {tolerated}"
    if study.scheme == "ckks-authority":
        return f"{study.quorum} silos that uploaded, by the authority {tolerated}"
    return (
        f"{study.quorum} silos, if all that made the key decrypt; otherwise the rest repeat "
        f"{tolerated}"
    )


def _authority(study: Any) -> str:
    named = [p.name for p in study.roster if p.role == "authority"]
    return (
        f"{named[0] if named else 'not named yet'}; holds the decryption key, opens one sum a "
        "round and sees neither sums nor updates. TOGETHER WITH THE SERVER IT CAN OPEN SINGLE "
        "UPDATES: choose a party that does not collude with it"
    )


def _packing(study: Any) -> str:
    ring, field = study.ring, study.field
    if ring is None:
        return (
            f"{field.per_word} fields of {field.bits} bits per 64-bit word "
            f"({8 / field.per_word:.2f} bytes a value)"
        )
    after = "exact once rounded" if ring.exact else f"at most {ring.greatest_error:.0f}"
    up, share = _ring_bytes(study)
    return (
        f"CKKS {ring.name}, N = 4096, q of {ring.prime.bit_length()} bits, Δ = 2^{ring.scale_bits} "
        f"({up:.2g} bytes a value of a million and {share:.2g} to decrypt), a sum of "
        f"{ring.silos} cannot wrap, predicted rms error {ring.rms:.2g} units ({after}), flooding "
        f"2^{ring.flood_bits} for one decryption per key"
    )


def _advantage(study: Any, values: int | None) -> str:
    """How much all decryptions together help to distinguish two runs with the same sums."""
    from securefedcollm.aggregation.ckks.parameters import MOST_OPENINGS

    counted = values or 10**6
    bound = study.ring.advantage(counted, study.sums)
    told = f"an advantage of at most {bound:.1g}" if bound < 1 else "no statistical bound"
    hint = "" if values else "; --estimate counts those of this adapter"
    return (
        f"{told} beyond the sums, whole run: {study.sums} sums of {counted:,} values, each opened "
        f"up to {MOST_OPENINGS} times{hint}"
    )


def _ring_bytes(study: Any) -> tuple[float, float]:
    """Bytes a value, of a million: of a ciphertext with a silo's parts of all keys, and of a share
    (which the authority sends, where there is one)."""
    shape = study.ring.shape(10**6, study.silos.colluders)
    size = study.ring.value_bytes * 4096 / 10**6
    keys = 0 if study.scheme == "ckks-authority" else study.silos.count * shape.keys
    return size * (keys + shape.chunks + shape.seconds), size * shape.chunks


def _ring_facts(study: Any, values: int | None) -> dict[str, Any] | None:
    from securefedcollm.aggregation.ckks.parameters import MOST_OPENINGS

    ring = study.ring
    if ring is None:
        return None
    return {
        "set": ring.name,
        "key_model": study.aggregation.key_model,
        "modulus_bits": ring.prime.bit_length(),
        "scale_bits": ring.scale_bits,
        "flood_bits": ring.flood_bits,
        "rms": ring.rms,
        "greatest_error": ring.greatest_error,
        "exact": ring.exact,
        "advantage": {
            "bound": ring.advantage(values or 10**6, study.sums),
            "values": values or 10**6,
            "sums": study.sums,
            "openings": MOST_OPENINGS,
        },
    }
