"""Evidence of a run that somebody who trusts nobody can check.

Every participant keeps an append-only log (:mod:`.log`) of typed entries (:mod:`.entries`) under a
Merkle tree (:mod:`.merkle`) whose head it signs (:mod:`.note`). A bundle (:mod:`.bundle`) is the
archive that an auditor gets; ``securefedcollm_audits.verify`` checks it.
"""
