"""The studies behind a study that continues earlier ones, a row for each.

Adversary: whoever shows other bundles than those of the chain. A row belongs to a study's digest,
which the study under report names, and to the run whose log it names: anybody can run a study
without a roster again. Whether the chain itself holds is the check ``continued``.
"""

from __future__ import annotations

from collections.abc import Sequence

from securefedcollm.evidence.bundle import Bundle
from securefedcollm.evidence.entries import Spent
from securefedcollm_audits.report.claim import may_end_early
from securefedcollm_audits.report.rows import StudyRow
from securefedcollm_audits.verification.case import Case
from securefedcollm_audits.verification.chain import names_run
from securefedcollm_audits.verification.checks.budget import by_part, last_claim, trainings
from securefedcollm_audits.verification.progress import progress
from securefedcollm_audits.verification.verdict import Verdict

Looked = tuple[Verdict, Bundle | None]
"""A bundle's own verdict, and what is in it if it can be read."""


def life(verdict: Verdict, case: Case, earlier: Sequence[Looked]) -> list[StudyRow]:
    """Oldest first, the study under report last; none for one that starts from its base models."""
    if case.study.continues is None:
        return []
    given = {found.digest: (found, bundle) for found, bundle in earlier if bundle is not None}
    rows = []
    for link in case.study.continues.earlier:
        found, bundle = given.get(link.study, (None, None))
        before = Case(bundle) if bundle else None
        if found is None or before is None or not names_run(link, before):
            rows.append(StudyRow("", link.study, None, "–", 0, None, None, None, None))
        else:
            rows.append(_row(found, before))
    return [*rows, _row(verdict, case)]


def _row(verdict: Verdict, case: Case) -> StudyRow:
    privacy, far, spent = case.study.privacy, progress(case), _spent(case)
    return StudyRow(
        name=case.study.study,
        study=case.digest.hex(),
        run=case.run.hex(),
        rounds=f"{far.done} of {far.rounds}",
        silos=case.study.silos.count,
        agreed=privacy.epsilon if privacy else None,
        spent=spent.epsilon if spent else None,
        delta=spent.delta if spent else privacy.delta if privacy else None,
        sound=all(result.name == "continued" for result in verdict.failed),
    )


def _spent(case: Case) -> Spent | None:
    """Adversary: a log of a bundle that does not hold may say anything; the row says so too."""
    if may_end_early(case):
        return None  # what was spent until then is no bound
    parts = [part for log in case.silos.values() for part in by_part(case.study, trainings(log))]
    claims = [claim for part in parts for _, claim in last_claim(part)]
    return max(claims, key=lambda claim: claim.epsilon, default=None)
