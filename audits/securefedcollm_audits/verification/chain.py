"""The chain of runs behind a study that continues earlier ones: does it start from what they made?

Adversary: whoever writes a study that starts from another adapter than an earlier run released, or
from a run that did not go as its participants agreed; whoever tunes another base than the chain
makes. All is compared by digests, without weights and offline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from securefedcollm.errors import ConfigError
from securefedcollm.evidence.bundle import Bundle
from securefedcollm.evidence.entries import Finished, Round
from securefedcollm.federation.keeping import best_of
from securefedcollm.study.continuing import Earlier, ModelName, link_base
from securefedcollm_audits.verification.case import SERVER, Case, NotCovered, count, of
from securefedcollm_audits.verification.verdict import Check, Faults, Result, Verdict, carry_out

Look = Callable[[Path], tuple[Verdict, Bundle | None]]
"""Verifies one earlier bundle by itself."""

_TITLE: Final = "The study starts from what the earlier runs released"
_BUDGET: Final = frozenset({"charged-first", "mechanism", "budget", "second-accountant"})
"""Without these an earlier run may have overspent."""
_ADAPTER: Final = "adapter_model.safetensors"


def follow(case: Case, bundles: Sequence[Path], look: Look) -> list[Result]:
    """The row of the table; none for a study that starts from its base models.

    Args:
        bundles: of the earlier runs, in any order.

    Raises:
        ConfigError: earlier bundles were given, and the study names no earlier run.
    """
    if case.study.continues is None:
        if bundles:
            raise ConfigError(
                "this study starts from its base models, and no earlier run",
                where="--earlier",
                hint="leave it out",
            )
        return []
    check = Check("continued", _TITLE, lambda case, wrong: _follow(case, bundles, look, wrong))
    return [carry_out(check, case)]


def _follow(case: Case, bundles: Sequence[Path], look: Look, wrong: Faults) -> str:
    assert case.study.continues is not None
    chain = case.study.continues.earlier
    silent: dict[str, list[str]] = {}
    given = _opened(bundles, look, {link.study for link in chain}, wrong, silent)
    cases = [given.get(link.study) for link in chain]
    for number, (link, before) in enumerate(zip(chain, cases, strict=True)):
        if before is None:
            continue
        name = before.study.study
        _same_run(link, before, name, wrong)
        _released(link, before, name, case.study.models.llm is not None, wrong)
        _same_past(chain[:number], before, name, wrong)
        after = ([*cases, case])[number + 1]
        if after is not None:
            _same_base(link, before, after, name, wrong)
    missing = [link.run for link, before in zip(chain, cases, strict=True) if before is None]
    if missing:
        raise NotCovered(
            f"no bundle of the earlier {'run' if len(missing) == 1 else 'runs'} "
            f"{', '.join(missing)} was given (--earlier BUNDLE)"
        )
    _heard(given, silent)
    names = ", ".join(before.study.study for before in cases if before is not None)
    return f"{count(len(chain), 'earlier run')} ({names}), whose evidence holds; same adapters"


def _opened(
    bundles: Sequence[Path],
    look: Look,
    named: set[str],
    wrong: Faults,
    silent: dict[str, list[str]],
) -> dict[str, Case]:
    """Study digest → the earlier run; every bundle that was given must be sound, and one of them.

    Adversary: whoever hands the auditor a forged past that fits the study.

    Args:
        silent: gets the checks of the budget that a bundle says nothing about.
    """
    found: dict[str, Case] = {}
    for path in bundles:
        verdict, bundle = look(path)
        for failed in verdict.failed:
            wrong(str(path), f"{failed.title}: not so ({failed.evidence})")
        if bundle is None:
            continue
        before = Case(bundle)
        digest = before.digest.hex()
        if digest not in named:
            wrong(str(path), f"is of the study {digest[:16]}…, which this study does not name")
        if digest in found:
            wrong(str(path), "is the second bundle of that study: give one")
        found[digest] = before
        silent[digest] = [
            result.name
            for result in verdict.results
            if result.status == "not covered" and result.name in _BUDGET
        ]
    return found


def _heard(given: dict[str, Case], silent: dict[str, list[str]]) -> None:
    """Adversary: whoever overspent in an earlier run, and hands over the server's log alone.

    Raises:
        NotCovered: an earlier study claims privacy, and its bundle does not show the charges.
    """
    for digest, before in given.items():
        if before.study.privacy is not None and silent[digest]:
            what = ", ".join(silent[digest])
            raise NotCovered(
                f"the bundle of {before.study.study} says nothing about {what}: give one with the "
                "silos' logs"
            )


def _same_run(link: Earlier, before: Case, name: str, wrong: Faults) -> None:
    """Adversary: whoever runs the same study twice and continues from the better one."""
    entries = len(before.need_server())
    if link.entries > entries:
        wrong(name, f"its server's log has {entries} entries, the study names {link.entries}")
    elif not names_run(link, before):
        wrong(name, "is another run of that study than the one named")


def names_run(link: Earlier, before: Case) -> bool:
    """Whether the server's log in that bundle begins as the one that the study names."""
    roots = before.roots(SERVER) if before.server else []
    return link.entries < len(roots) and roots[link.entries].hex() == link.root


def _released(link: Earlier, before: Case, name: str, large: bool, wrong: Faults) -> None:
    finished = [what for _, what in of(before.server, Finished)]
    if not before.over or not finished:
        wrong(name, "the run was not finished")
        return
    made = [finished[-1].files]
    best = best_of(before.study, before.scores)
    if best is not None:
        made.append(finished[best - 1].files)
    models: tuple[ModelName, ...] = ("slm", "llm") if large else ("slm",)
    for model in models:
        if link.of(model) not in {files.get(f"{model}/{_ADAPTER}") for files in made}:
            wrong(name, f"released another {model} adapter than this study starts from")
    adapter = before.study.adapter
    if link.scale != adapter.alpha / adapter.rank:
        wrong(name, f"its adapters have the scale {adapter.alpha / adapter.rank:g}, not this one")


def _same_past(chain: Sequence[Earlier], before: Case, name: str, wrong: Faults) -> None:
    """The directories may be called differently; the digests may not differ."""
    own = before.study.continues.earlier if before.study.continues else []
    if [_digests(link) for link in own] != [_digests(link) for link in chain]:
        wrong(name, "started from other runs than this study says")


def _digests(link: Earlier) -> tuple[object, ...]:
    return link.study, link.entries, link.root, link.scale, link.slm, link.llm


def _same_base(link: Earlier, before: Case, after: Case, name: str, wrong: Faults) -> None:
    """Adversary: a server and silos that tune another base than the signed study makes."""
    bases, tuned = _bases(before), _bases(after)
    for case, found in ((before, bases), (after, tuned)):
        if len(found) != 1:
            wrong(case.study.study, f"its logs name {len(found)} base models")
    if len(bases) == len(tuned) == 1:
        (base,), (now,) = bases, tuned
        made = link_base(bytes.fromhex(base), link, "slm").hex()
        if now != made:
            wrong(
                after.study.study,
                f"tuned the base {now[:16]}…; {name} with its adapter is {made[:16]}…",
            )


def _bases(case: Case) -> set[str]:
    return {what.base for log in case.logs.values() for _, what in of(log, Round)}
