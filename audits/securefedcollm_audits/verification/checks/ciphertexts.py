"""CKKS rounds: signatures over ciphertexts, agreements, and the authority's openings."""

from __future__ import annotations

from collections.abc import Iterator

from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks.authority import messages as am
from securefedcollm.aggregation.messages import UNSIGNED, Signable
from securefedcollm.errors import CryptoError
from securefedcollm.evidence.entries import (
    Ciphertexts,
    Decrypted,
    Entry,
    Opening,
    Summed,
    Told,
    Word,
)
from securefedcollm.federation.plan import AUTHORITY
from securefedcollm.primitives import verify
from securefedcollm_audits.verification.case import Case, NotCovered, count, of
from securefedcollm_audits.verification.verdict import Check, Faults


def ciphertexts(case: Case, wrong: Faults) -> str:
    """Adversary: a server that has something other than the sum of the committed ciphertexts
    decrypted; or that writes down signatures which nobody gave."""
    if case.study.masked:
        raise NotCovered("the study's scheme is masking: there are no ciphertexts")
    signatures = openings = 0
    for log in case.logs.values():
        for entry, what in _opened(log):
            if what.ciphertexts is None:
                wrong(entry, "does not say which ciphertexts were added")
                continue
            openings += 1
            signatures += _Opened(case, entry, what, what.ciphertexts, wrong).check()
    if not openings:
        raise NotCovered("nothing was opened")
    return f"{count(openings, 'opening')}: {count(signatures, 'signature')} over ciphertexts"


def _opened(log: list[Entry]) -> Iterator[tuple[Entry, Opening | Decrypted]]:
    for entry in log:
        if isinstance(entry.what, Opening | Decrypted):
            yield entry, entry.what


class _Opened:
    """One opening, checked in the same way as silos and authority checked it during the round."""

    def __init__(
        self,
        case: Case,
        entry: Entry,
        what: Opening | Decrypted,
        ciphertexts: Ciphertexts,
        wrong: Faults,
    ) -> None:
        self._case = case
        self._entry = entry
        self._what = what
        self._of = ciphertexts
        self._wrong = wrong
        self._roster = case.roster
        self._header = bytes.fromhex(what.header)
        self._key = bytes.fromhex(ciphertexts.key)
        self._count = 0

    def check(self) -> int:
        """Number of signatures that verify."""
        what = self._what
        listed = set(what.survivors) | set(what.dropouts)
        if set(self._of.roots) != listed:
            self._wrong(self._entry, "the ciphertexts are not those of the silos on the lists")
            return 0
        sealed = [self._sealed(name) for name in self._roster.names if name in listed]
        for entry in sealed:
            self._silo(self._roster.name(entry.index), "commitment", entry, entry.signature)
        if m.transcript(self._key, sealed).hex() != what.delivery:
            self._wrong(self._entry, "what was signed is not the digest of these ciphertexts")
        if self._case.keyed:
            self._check_key()
            self._check_consents()
        else:
            self._check_verdicts()
        return self._count

    def _sealed(self, name: str) -> m.Sealed:
        said = self._of.roots[name]
        root, raw = bytes.fromhex(said.root), bytes.fromhex(said.signature)
        return m.Sealed(self._header, self._roster.index(name), raw, self._key, root)

    def _check_key(self) -> None:
        """The key is the authority's, and of this attempt."""
        offer, public = self._of.offer, self._case.key(AUTHORITY)
        if offer is None or public is None:
            self._wrong(self._entry, "does not say whose key it was")
            return
        raw = bytes.fromhex(offer.signature)
        said = am.key_statement(self._header, bytes.fromhex(offer.part))
        self._signature("the authority", "key", am.KeyStatement.CONTEXT, said, raw, public)
        if am.key_id(public, said, raw) != self._key:
            self._wrong(self._entry, "the ciphertexts are under another key than the authority's")

    def _check_consents(self) -> None:
        transcript = bytes.fromhex(self._what.delivery)
        for name, raw in self._what.agreements.items():
            said = am.Consent(self._header, self._roster.index(name), UNSIGNED, transcript)
            self._silo(name, "consent", said, bytes.fromhex(raw))

    def _check_verdicts(self) -> None:
        """Everybody was given these ciphertexts, and agreed to open their sum."""
        # Adversary: a server that writes down a member of the sum as a dropout. Under a shared key
        # it takes all members to open anything: there are no dropouts.
        if self._what.dropouts or set(self._what.agreements) != set(self._of.roots):
            self._wrong(self._entry, "a member that has a share of the key is not in the sum")
        transcript = bytes.fromhex(self._what.delivery)
        for name, raw in self._what.agreements.items():
            said = m.Verdict(self._header, self._roster.index(name), UNSIGNED, transcript)
            self._silo(name, "verdict", said, bytes.fromhex(raw))

    def _silo(self, name: str, kind: str, said: Signable, raw: bytes) -> None:
        key = self._roster.key(self._roster.index(name))
        self._signature(name, kind, said.CONTEXT, said.signed(), raw, key)

    def _signature(
        self, name: str, kind: str, context: bytes, said: bytes, raw: bytes, key: bytes
    ) -> None:
        try:
            verify(key, context, said, raw)
        except CryptoError:
            self._wrong(self._entry, f"the {kind} of {name} does not verify")
        self._count += 1


def authority(case: Case, wrong: Faults) -> str:
    """Adversary: a server that reports another sum to silos than was opened; an authority that
    tells different parties different things."""
    if not case.keyed:
        raise NotCovered("no party holds a key of its own in this study")
    public = case.key(AUTHORITY)
    if public is None:
        raise NotCovered("no log says who the authority is")
    words = 0
    told: dict[str, tuple[Word, Entry]] = {}
    deliveries = {
        what.header: what.delivery for log in case.logs.values() for _, what in _opened(log)
    }
    for log in case.logs.values():
        for entry in log:
            what = entry.what
            if not isinstance(what, Told | Decrypted | Summed):
                continue
            if what.word is None:
                wrong(entry, "does not hold the authority's word")
                continue
            words += 1
            first, where = told.setdefault(what.header, (what.word, entry))
            if first != what.word:
                wrong(entry, f"another word of the authority than {where.place}")
            delivery = deliveries.get(what.header) if isinstance(what, Summed) else what.delivery
            if delivery is None or not _said(case, what, what.word, delivery, public):
                wrong(entry, "the authority's word on this sum does not verify")
    if case.authority:
        known = {what.header for _, what in of(case.authority, Decrypted)}
        for entry, what in (pair for log in case.logs.values() for pair in of(log, Summed)):
            if what.header not in known:
                wrong(entry, "a sum that the authority's log does not know")
    if not words:
        raise NotCovered("nothing was opened")
    return f"{count(len(told), 'sum')} on the authority's word, in {count(words, 'entry')}"


def _said(
    case: Case, what: Told | Decrypted | Summed, word: Word, delivery: str, public: bytes
) -> bool:
    survivors = tuple(case.roster.index(name) for name in what.survivors)
    header, transcript = bytes.fromhex(what.header), bytes.fromhex(delivery)
    said = am.Statement(header, UNSIGNED, transcript, survivors, bytes.fromhex(word.share))
    try:
        verify(public, said.CONTEXT, said.signed(), bytes.fromhex(word.signature))
    except CryptoError:
        return False
    return True


CHECKS = (
    Check("ciphertexts", "What was decrypted is the sum of committed ciphertexts", ciphertexts),
    Check("authority", "The authority says that it opened these sums", authority),
)
