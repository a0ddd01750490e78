"""The rounds: parameters, models, quorums, signatures, and what was opened."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from securefedcollm.aggregation.masking.graph.choice import survivors_digest
from securefedcollm.aggregation.masking.messages import Agreement
from securefedcollm.aggregation.messages import UNSIGNED, lists_digest
from securefedcollm.errors import CryptoError
from securefedcollm.evidence.entries import (
    Agreed,
    Decrypted,
    Entry,
    Finished,
    Keyed,
    Opening,
    Round,
    Summed,
    Told,
    Unmasked,
    Uploaded,
)
from securefedcollm.evidence.many import bits_of
from securefedcollm.federation.keeping import BEST, best_of
from securefedcollm.federation.messages import model_digest_of
from securefedcollm.federation.plan import round_of, sum_name, validates
from securefedcollm.primitives import verify
from securefedcollm_audits.verification.case import Case, NotCovered, count, fewest, of
from securefedcollm_audits.verification.verdict import Check, Faults


def headers(case: Case, wrong: Faults) -> str:
    """Adversary: a server that runs another threshold, modulus, roster or model than was signed.
    Every message and key of an attempt is bound to its header, which is computed afresh here."""
    noised = case.study.privacy is not None and case.study.privacy.noise == "distributed"
    attempts = 0
    for log in case.logs.values():
        for entry, what in of(log, Round):
            parts = (what.base, what.layout, what.adapter, what.mechanism or "")
            base, layout, adapter, mechanism = (bytes.fromhex(part) for part in parts)
            if (what.mechanism is not None) != (noised or validates(case.study, what.round)):
                wrong(entry, "noise in the sum and the study do not fit")
            if model_digest_of(base, layout, adapter, mechanism).hex() != what.model:
                wrong(entry, "the model's digest is not that of its parts")
            if case.header(what).digest.hex() != what.header:
                wrong(entry, "the header is not that of the study, roster, run and model")
            attempts += 1
        for entry, key in of(log, Keyed):
            if case.header(key).digest.hex() != key.header:
                wrong(entry, "the header is not that of the study, roster, run and model")
            attempts += 1
    if not attempts:
        raise NotCovered("no round has begun")
    study = case.study
    return (
        f"{count(attempts, 'attempt')}: {study.silos.count} silos, {fewest(study)} for a sum, "
        f"threshold {study.threshold}, {study.silos.colluders} may collude"
    )


def models(case: Case, wrong: Faults) -> str:
    """Adversary: a server that swaps the model between rounds, or shows silos different ones."""
    pinned, base = _pinned(case), ""
    ends = {what.round: what.adapter for _, what in of(case.server, Finished)}
    starts: dict[int, str] = {}
    for log in case.logs.values():
        for entry, what in of(log, Round):
            base = base or what.base
            if what.base != base or what.base != (pinned or what.base):
                wrong(entry, "another base model than pinned, or than in the other rounds")
            if starts.setdefault(what.round, what.adapter) != what.adapter:
                name = sum_name(case.study, what.round)
                wrong(entry, f"another adapter in {name} than elsewhere")
            if validates(case.study, what.round) and (
                ends.get(what.round, what.adapter) != what.adapter
            ):
                wrong(entry, "asks silos about another adapter than the round ended with")
            if ends.get(what.round - 1, what.adapter) != what.adapter:
                before = round_of(case.study, what.round - 1) + 1
                wrong(entry, f"does not start from what round {before} ended with")
    if not starts:
        raise NotCovered("no round has begun")
    pin = "as the study pins it" if pinned else "not pinned by the study"
    return f"base sha256:{base[:16]}… ({pin}), {count(len(starts), 'adapter')} in a chain"


def _pinned(case: Case) -> str | None:
    """The base that the study pins, with the earlier adapters that it folds into it."""
    pinned, chain = case.study.models.slm.sha256, case.study.continues
    if pinned is None or chain is None:
        return pinned
    return chain.base("slm", bytes.fromhex(pinned)).hex()


def artefacts(case: Case, wrong: Faults) -> str:
    """Adversary: whoever swaps the adapters that are handed on after the run, or hands on another
    round's as the best one's."""
    case.need_server()
    if not case.over:
        raise NotCovered(f"the run is under way: {case.rounds_done()} of {case.study.rounds}")
    finished = list(of(case.server, Finished))
    entry, last = finished[-1]
    here = case.bundle.artefacts
    if not here:
        wrong("artefacts.json", "missing or empty")
        return ""
    made = {path: (entry, content) for path, content in last.files.items()}
    best = best_of(case.study, case.scores)
    if best is not None:
        where, what = finished[best - 1]
        made |= {f"{BEST}/{path}": (where, content) for path, content in what.files.items()}
    for path in sorted({*here, *made}):
        maker, content = made.get(path, (entry, ""))
        if here.get(path) != content:
            wrong("artefacts.json", f"{path} is not what {maker.place} made")
    also = f"; the best round's as {where.place}" if best is not None else ""
    return f"{count(len(here), 'file')}, hashes as {entry.place} says{also}"


def quorum(case: Case, wrong: Faults) -> str:
    """Adversary: a server that opens a sum of so few silos that it shows one of them."""
    study, sums = case.study, 0
    known = set(case.roster.names)
    for log in case.logs.values():
        for entry, what in _openings(log):
            survivors, dropouts = set(what.survivors), set(what.dropouts)
            if len(what.survivors) != len(survivors) or len(survivors) < study.quorum:
                wrong(entry, f"a sum of {len(survivors)} silos; {study.quorum} are needed")
            if survivors & dropouts or not survivors | dropouts <= known:
                wrong(entry, "a silo is on both lists, or on no roster")
            if isinstance(what, Agreed | Told) and entry.owner not in survivors:
                wrong(entry, "agrees to a sum that it is not in")
            if isinstance(what, Opening | Decrypted):
                if not set(what.agreements) <= survivors:
                    wrong(entry, "an agreement by a silo that is not in the sum")
                if not study.masked and set(what.agreements) != survivors:
                    wrong(entry, "a silo is in the sum that did not agree to it")
                elif len(what.agreements) < study.threshold:
                    wrong(entry, f"{len(what.agreements)} agreements; {study.threshold} are needed")
            sums += 1
    if not sums:
        raise NotCovered("nothing was opened")
    return f"{count(sums, 'opening')}: at least {fewest(study)} silos in each sum"


def agreements(case: Case, wrong: Faults) -> str:
    """Adversary: a server that opens a sum which the silos did not agree to.

    ``ciphertexts`` checks what silos sign under CKKS.
    """
    signatures = lists = 0
    roster, masked = case.roster, case.study.masked
    for log in case.logs.values():
        for entry, what in _openings(log):
            digest = _signed_lists(case, what)
            if digest.hex() != what.lists:
                wrong(entry, "what was signed is not the digest of these lists")
            lists += 1
            if not isinstance(what, Opening) or not masked:
                continue
            for name, signature in what.agreements.items():
                index = roster.index(name)
                said = Agreement(
                    header=bytes.fromhex(what.header), index=index, signature=UNSIGNED, lists=digest
                )
                try:
                    verify(roster.key(index), said.CONTEXT, said.signed(), bytes.fromhex(signature))
                except CryptoError:
                    wrong(entry, f"the agreement of {name} does not verify")
                signatures += 1
    if not lists:
        raise NotCovered("nothing was opened")
    if not masked:
        return f"{count(lists, 'list')}, each the digest of who is in the sum"
    return f"{count(signatures, 'signature')} by survivors, {count(lists, 'list')}"


def _signed_lists(case: Case, what: Opening | Agreed | Told | Decrypted) -> bytes:
    """The digest of who is in the sum, as silos sign it."""
    delivery, roster = bytes.fromhex(what.delivery), case.roster
    if case.study.graph is not None:
        packed = bytes.fromhex(bits_of(roster, tuple(what.survivors)))
        return survivors_digest(delivery, packed)
    survivors = [roster.index(name) for name in what.survivors]
    return lists_digest(delivery, survivors, [roster.index(name) for name in what.dropouts])


def _openings(log: list[Entry]) -> Iterable[tuple[Entry, Opening | Agreed | Told | Decrypted]]:
    for entry in log:
        if isinstance(entry.what, Opening | Agreed | Told | Decrypted):
            yield entry, entry.what


def one_kind(case: Case, wrong: Faults) -> str:
    """Adversary: a server that collects both kinds of share of one silo: seed and mask key together
    unmask its update."""
    kinds: dict[tuple[int, int], dict[str, dict[str, Entry]]] = defaultdict(dict)
    answers, known = 0, set[object]()
    for log in case.need_silos().values():
        for entry, what in of(log, Unmasked):
            answers += 1
            said = (what.round, what.attempt, tuple(what.seeds_of), tuple(what.keys_of))
            if said in known:
                continue
            known.add(said)
            attempt = kinds[what.round, what.attempt]
            for kind, dealers in (("seed", what.seeds_of), ("mask key", what.keys_of)):
                for dealer in dealers:
                    given = attempt.setdefault(dealer, {})
                    given.setdefault(kind, entry)
                    if len(given) > 1:
                        other = next(e for k, e in given.items() if k != kind)
                        wrong(entry, f"{dealer}: both kinds of share, see {other.place}")
    if not answers:
        raise NotCovered("no silo has unmasked anything")
    return f"{count(answers, 'answer')} of silos: one kind of share of each dealer"


def one_sum(case: Case, wrong: Faults) -> str:
    """Adversary: a server that has two sums of one round opened; their difference is one silo's.

    No silo answers for two sets of survivors in one round, none hears of another set in the attempt
    that it answers, and nobody writes down the sum of another set. That is enough: twice the
    threshold is more than the silos and the colluders together, so of two sets one stays closed.
    A silo may have answered for another set than was opened, in an attempt that failed.
    """
    attempts: dict[tuple[int, int], tuple[list[str], Entry]] = {}
    opened: dict[int, tuple[list[str], Entry]] = {}
    values: dict[int, tuple[str, Entry]] = {}
    for log in case.logs.values():
        own: dict[int, tuple[list[str], Entry]] = {}
        for entry in log:
            what = entry.what
            if isinstance(what, Unmasked):
                said = [own]
                survivors = what.seeds_of
            elif isinstance(what, Summed | Told | Decrypted):
                said = [own, opened]
                survivors = what.survivors
            else:
                continue
            earlier = [sets.setdefault(what.round, (survivors, entry)) for sets in said]
            earlier.append(attempts.setdefault((what.round, what.attempt), (survivors, entry)))
            for others, where in earlier:
                if others != survivors:
                    name, place = sum_name(case.study, what.round), where.place
                    wrong(entry, f"{name} was opened for others too, see {place}")
                    break
            if isinstance(what, Summed):
                value, where = values.setdefault(what.round, (what.sum, entry))
                if value != what.sum:
                    name = sum_name(case.study, what.round)
                    wrong(entry, f"a second sum of {name}, see {where.place}")
    if not attempts:
        raise NotCovered("nothing was opened")
    return f"{count(len(opened), 'sum')}, one set of survivors in each"


def transcripts(case: Case, wrong: Faults) -> str:
    """Adversary: a server that tells silos, or the auditor, different things about a round."""
    if len(case.logs) < 2:
        raise NotCovered("only one participant's log is in this bundle")
    begun: dict[tuple[int, int], tuple[str, Entry]] = {}
    for log in case.logs.values():
        for entry, what in of(log, Round):
            header, where = begun.setdefault((what.round, what.attempt), (what.header, entry))
            if header != what.header:
                wrong(entry, f"another header than {where.place}: another model or roster")
    for entry, key in of(case.authority, Keyed):
        header, where = begun.setdefault((key.round, key.attempt), (key.header, entry))
        if header != key.header:
            wrong(entry, f"another header than {where.place}: another model or roster")
    agreed: dict[tuple[int, int], tuple[str, Entry]] = {}
    for log in case.logs.values():
        for entry, said in _openings(log):
            lists, where = agreed.setdefault((said.round, said.attempt), (said.lists, entry))
            if lists != said.lists:
                wrong(entry, f"other lists than {where.place}")
    if case.server:
        for name, log in case.silos.items():
            _story(case, name, log, wrong)
        shown = {what.header for _, what in of(case.server, Opening)}
        for entry, opened in of(case.authority, Decrypted):
            if opened.header not in shown:
                wrong(entry, "the server's log hides that this was opened")
    return f"{count(len(begun), 'attempt')} in {count(len(case.logs), 'log')}"


def _story(case: Case, name: str, log: list[Entry], wrong: Faults) -> None:
    """One silo's log against the server's."""
    openings = {what.header: what for _, what in of(case.server, Opening)}
    for entry in log:
        if isinstance(entry.what, Unmasked | Told) and entry.what.header not in openings:
            wrong(entry, "the server's log hides that this was opened")
    uploads = {what.header: what for _, what in of(log, Uploaded)}
    # Under an authority's key a silo agrees when it uploads.
    mine = set(uploads) if case.keyed else {what.header for _, what in of(log, Agreed)}
    for entry, opening in of(case.server, Opening):
        if name in opening.agreements and opening.header not in mine:
            wrong(entry, f"an agreement that the log of {name} does not know")
        if name not in opening.survivors:
            continue
        upload = uploads.get(opening.header)
        if upload is None or upload.delivery != opening.delivery:
            wrong(entry, f"counts an upload that the log of {name} does not know")


CHECKS = (
    Check("headers", "Sizes, thresholds and models are those of the study", headers),
    Check("models", "Every round starts from what the last one ended with", models),
    Check("artefacts", "The adapters are those that the last round made", artefacts),
    Check("quorum", "Every sum has enough silos in it, and enough agreed", quorum),
    Check("agreements", "The survivors signed who is in the sum", agreements),
    Check("one-kind", "No silo had both kinds of share revealed", one_kind),
    Check("one-sum", "Every round was opened for one set of silos", one_sum),
    Check("transcripts", "Silos and server tell the same story", transcripts),
)
