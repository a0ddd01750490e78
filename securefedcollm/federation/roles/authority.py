"""The authority of a real run, in a study in which one party holds the key."""

from __future__ import annotations

from collections.abc import Callable

from securefedcollm.evidence.entries import Entry
from securefedcollm.evidence.log import FILE_NAME as EVIDENCE
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.authority import AuthoritySession
from securefedcollm.federation.files import make_directory
from securefedcollm.federation.plan import AUTHORITY
from securefedcollm.federation.records import AuthorityRecord
from securefedcollm.federation.roles.member import Member
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.study import digest


def authority_session(
    member: Member, *, on_entry: Callable[[Entry], None] | None = None
) -> AuthoritySession:
    """The key holder's side of the run, over the state in its home.

    Raises:
        ConfigError: in this study no party holds a key.
    """
    place = make_directory(member.run / AUTHORITY)
    log = EvidenceLog(
        place / EVIDENCE,
        study=digest(member.study),
        owner=AUTHORITY,
        key=member.key,
        on_entry=on_entry,
    )
    return AuthoritySession(
        study=member.study,
        roster=member.roster,
        key=member.key,
        store=SiloStore(place, "authority.sqlite"),
        evidence=AuthorityRecord(
            log, key=member.key.public, roster=member.roster, server=member.server
        ),
    )
