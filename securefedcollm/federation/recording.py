"""What the two round loops write into their evidence logs, and how silos vouch for the server's.

Both classes take ``log=None`` and then write nothing: for tests of the loops alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Final

import numpy as np

from securefedcollm import __version__
from securefedcollm.aggregation import (
    AuthoritySide,
    Roster,
    RoundHeader,
    RoundResult,
    SchemeName,
    Sealing,
    SiloSide,
    Step,
    Transcript,
)
from securefedcollm.aggregation import Word as Statement
from securefedcollm.errors import (
    ConfigError,
    CryptoError,
    EvidenceError,
    RemoteProtocolError,
    StateError,
)
from securefedcollm.evidence.bundle import file_digests
from securefedcollm.evidence.entries import (
    Agreed,
    Ciphertexts,
    Decrypted,
    Failed,
    Finished,
    Keyed,
    Lost,
    Member,
    Offer,
    Opened,
    Opening,
    Refused,
    Root,
    Round,
    Summed,
    Told,
    Unmasked,
    Uploaded,
    Witnessed,
    Word,
    decode_entry,
)
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.merkle import (
    consistency_proof,
    inclusion_proofs,
    verify_consistency,
    verify_inclusion,
)
from securefedcollm.evidence.note import Checkpoint, cosign, origin, parse_checkpoint
from securefedcollm.evidence.software import bill_of_materials, code_digest
from securefedcollm.federation import messages
from securefedcollm.federation.anchors import check_journal
from securefedcollm.federation.files import write_durably
from securefedcollm.federation.plan import AUTHORITY
from securefedcollm.federation.silostore import Mark, SiloStore
from securefedcollm.primitives import SigningKey, sha256

_messages = logging.getLogger(__name__)

SERVER = "server"
SBOM = "sbom.json"
MOST_HEADS: Final = 64
"""Heads of the server's log that a silo vouches for between two attempts of its own."""


def _opened(
    header: RoundHeader, roster: Roster, server: bytes, authority: bytes, sbom: bytes | None
) -> Opened:
    silos = [
        Member(name, "silo", key.hex()) for name, key in zip(roster.names, roster.keys, strict=True)
    ]
    office = [Member(AUTHORITY, "authority", authority.hex())] if authority else []
    return Opened(
        study=header.study_digest.hex(),
        run=header.run_id.hex(),
        roster=[Member(SERVER, "server", server.hex()), *office, *silos],
        version=__version__,
        code=code_digest().hex(),
        sbom=None if sbom is None else sha256(sbom).hex(),
    )


Clip = tuple[float, float] | None


def _round(
    header: RoundHeader,
    base: bytes,
    layout: bytes,
    adapter: bytes | memoryview,
    mechanism: bytes,
    clip: Clip,
) -> Round:
    return Round(
        round=header.round,
        attempt=header.attempt,
        base=base.hex(),
        layout=layout.hex(),
        adapter=sha256(adapter).hex(),
        mechanism=mechanism.hex() or None,
        clip=clip,
        model=header.model_digest.hex(),
        values=header.parameters.values,
        header=header.digest.hex(),
    )


def _ciphertexts(sealing: Sealing) -> Ciphertexts:
    offer = sealing.offer
    return Ciphertexts(
        key=sealing.key.hex(),
        roots={name: Root(root.hex(), raw.hex()) for name, (root, raw) in sealing.roots.items()},
        offer=None if offer is None else Offer(offer[0].hex(), offer[1].hex()),
    )


def _word(word: Statement) -> Word:
    return Word(word.share.hex(), word.signature.hex())


def _refused(log: EvidenceLog | None, error: Exception) -> None:
    """A request was not answered. Only the kind of error is written: reasons are private.

    Adversary: a server that fills this disk with refusals. Of any number in a row one of each kind
    is written, and none before the first round.
    """
    if log is None or not log.size:
        return
    refusal = Refused(error=type(error).__name__)
    for entry in reversed(log.entries):
        if entry.what == refusal:
            return
        if not isinstance(entry.what, Refused):
            break
    try:
        log.append(refusal)
    except StateError as full:  # saying nothing needs no evidence
        _messages.warning("%s", full)


def _mark(log: EvidenceLog | None) -> list[Mark]:
    newest, attempts = -1, 0
    for entry in reversed(log.entries if log else ()):
        if isinstance(entry.what, Round | Keyed):
            if entry.what.round < newest:
                break
            newest, attempts = entry.what.round, attempts + 1
    return [Mark("evidence log", newest, attempts)] if attempts else []


def _check_base(log: EvidenceLog | None, base: bytes) -> None:
    """Adversary: whoever swaps this party's model files between two rounds of a run.

    Raises:
        ConfigError: an earlier round of this run had another base model.
    """
    rounds = (entry.what for entry in reversed(log.entries if log else ()))
    before = next((what.base for what in rounds if isinstance(what, Round)), base.hex())
    if before != base.hex():
        raise ConfigError(
            f"this base model has the digest {base.hex()[:16]}…, that of this run's earlier rounds "
            f"{before[:16]}…",
            where="models.slm",
            hint="put the files back that the run began with. If a version whose digest covered "
            "the weights alone began it, finish it with that version, or begin a new run",
        )


class SiloRecord:
    """A silo's side of the evidence.

    Args:
        server: the server's Ed25519 public key, 32 bytes.
        authority: the key holder's, where there is one.
    """

    def __init__(
        self,
        log: EvidenceLog | None,
        *,
        name: str,
        key: SigningKey,
        roster: Roster,
        server: bytes = b"",
        authority: bytes = b"",
    ) -> None:
        self._log = log
        self._name = name
        self._key = key
        self._roster = roster
        self._server = server
        self._authority = authority
        self._header: RoundHeader | None = None

    @property
    def marks(self) -> list[Mark]:
        """The newest sum in the log; none if there is none."""
        return _mark(self._log)

    def check_journal(self, journal: SiloStore, scheme: SchemeName) -> None:
        """Raises: StateError if ``journal`` does not know a step that the log knows."""
        check_journal(self._log, journal, scheme)

    def check_base(self, base: bytes) -> None:
        """Before anything of a round is written. See :func:`_check_base`."""
        _check_base(self._log, base)

    def round(
        self,
        header: RoundHeader,
        base: bytes,
        layout: bytes,
        adapter: bytes | memoryview,
        mechanism: bytes,
        clip: Clip = None,
    ) -> None:
        """Before this silo trains."""
        self._header = header
        if self._log is None:
            return
        if not self._log.size:
            self._log.append(_opened(header, self._roster, self._server, self._authority, None))
        self._log.append(_round(header, base, layout, adapter, mechanism, clip))

    def said(self, side: SiloSide) -> None:
        """After the aggregation's answer was made, before it leaves."""
        if self._log is None or self._header is None:
            return
        seen, round_, attempt = side.transcript, self._header.round, self._header.attempt
        header, lists = seen.header.hex(), seen.lists.hex()
        survivors, dropouts = list(seen.survivors), list(seen.dropouts)
        match side.step:
            case Step.AGREE | Step.NOTE:
                self._log.append(
                    Uploaded(
                        round=round_, attempt=attempt, header=header, delivery=seen.delivery.hex()
                    )
                )
            case Step.UNMASK:
                self._log.append(
                    Agreed(
                        round=round_,
                        attempt=attempt,
                        header=header,
                        delivery=seen.delivery.hex(),
                        survivors=survivors,
                        dropouts=dropouts,
                        lists=lists,
                    )
                )
            case Step.DONE if seen.word is not None:
                self._log.append(
                    Told(
                        round=round_,
                        attempt=attempt,
                        header=header,
                        delivery=seen.delivery.hex(),
                        survivors=survivors,
                        dropouts=dropouts,
                        lists=lists,
                        word=_word(seen.word),
                    )
                )
            case Step.DONE:
                self._log.append(
                    Unmasked(
                        round=round_,
                        attempt=attempt,
                        header=header,
                        lists=lists,
                        seeds_of=survivors,
                        keys_of=dropouts,
                    )
                )

    def refused(self, error: Exception) -> None:
        """A request was not answered."""
        _refused(self._log, error)

    def countersign(self, request: messages.Witness) -> messages.Witnessed:
        """Vouch for the server's log: it extends what this silo vouched for before, and says of
        every opening since then what this silo saw.

        Raises:
            RemoteProtocolError: it does not, or this silo has no log yet. Adversary: a server that
                rewrites its history, keeps one log for each reader, or fills this disk with heads.
        """
        if self._log is None or not self._log.size:
            raise RemoteProtocolError(
                "asked a silo that has taken part in no round to vouch for its evidence log",
                peer=SERVER,
            )
        last, heads = self._vouched()
        if request.old != last.size:
            return messages.Witnessed(last.size, b"")
        try:
            head = self._head(request.checkpoint)
            verify_consistency(
                last.size, bytes.fromhex(last.root), head.size, head.root, request.consistency
            )
            self._compare(request, head)
        except (EvidenceError, CryptoError) as error:
            raise RemoteProtocolError(
                f"its evidence log does not hold: {error.message}",
                peer=SERVER,
                hint="keep both signed heads, and stop: the server contradicts itself",
            ) from None
        if head.size > last.size:
            if heads >= MOST_HEADS:
                raise RemoteProtocolError(
                    f"asked to vouch for more than {MOST_HEADS} heads of its evidence log between "
                    "two attempts at a sum",
                    peer=SERVER,
                )
            self._log.append(Witnessed(size=head.size, root=head.root.hex()))
        line = cosign(head, self._log.origin, self._key, int(time.time()))
        return messages.Witnessed(head.size, line)

    def finished(self, delivery: messages.Deliver, quorum: int) -> Finished:
        """The entry of the server's log by which a round ended with the adapter of ``delivery``.

        Adversary: a server that hands one silo another adapter than it shows the others and the
        auditors, or an old one. So only the head counts that this silo vouched for last and that a
        quorum of silos vouches for (two quorums share an honest silo), and no round before the
        newest that this silo knows of.

        Raises:
            RemoteProtocolError: its log does not say so.
        """
        try:
            if self._log is None or not self._log.size:
                raise EvidenceError("this silo vouches for none")
            last, head = self._vouched()[0], self._head(delivery.checkpoint)
            if (head.size, head.root.hex()) != (last.size, last.root):
                raise EvidenceError("its head is not the one that this silo vouched for last")
            if (count := self._cosigners(head)) < quorum:
                raise EvidenceError(f"{count} silos vouch for it, {quorum} are needed")
            shown = delivery.finished
            verify_inclusion(shown.entry, shown.index, head.size, shown.inclusion, head.root)
            what = decode_entry(shown.entry, "the server's entry").what
            if not isinstance(what, Finished) or what.adapter != sha256(delivery.adapter).hex():
                raise EvidenceError("no round ended with this adapter")
            if any(what.round < mark.sum for mark in self.marks):
                raise EvidenceError("it is a past round's")
        except (EvidenceError, CryptoError) as error:
            raise RemoteProtocolError(
                f"delivered an adapter that its evidence log does not vouch for: {error.message}",
                peer=SERVER,
                hint="nothing was kept of it",
            ) from None
        return what

    def _head(self, note: str) -> Checkpoint:
        """A head of the server's log, signed by it; raises EvidenceError and CryptoError."""
        assert self._log is not None
        head = parse_checkpoint(note)
        if head.origin != origin(self._log.study, SERVER):
            raise EvidenceError("the checkpoint is of another log")
        head.verify(self._server)
        return head

    def _cosigners(self, head: Checkpoint) -> int:
        assert self._log is not None
        count = 0
        for name, key in zip(self._roster.names, self._roster.keys, strict=True):
            with contextlib.suppress(CryptoError):
                head.verify_cosigned(origin(self._log.study, name), key)
                count += 1
        return count

    def _vouched(self) -> tuple[Witnessed, int]:
        """The newest head vouched for, and how many there are since the newest attempt."""
        assert self._log is not None
        heads, attempted = 0, False
        newest: Witnessed | None = None
        for entry in reversed(self._log.entries):
            attempted = attempted or isinstance(entry.what, Round)
            if isinstance(entry.what, Witnessed):
                newest = newest or entry.what
                heads += not attempted
            if newest is not None and attempted:
                break
        return newest or Witnessed(size=0, root=sha256().hex()), heads

    def _compare(self, request: messages.Witness, head: Checkpoint) -> None:
        """What was opened since this silo last vouched, by the server's log and by its own.

        Adversary: a server that hides an opening in which this silo took part, or says that others
        were in the sum; whatever openings of other rounds it shows instead.
        """
        theirs: dict[str, Opening] = {}
        for shown in request.openings:
            verify_inclusion(shown.entry, shown.index, head.size, shown.inclusion, head.root)
            what = decode_entry(shown.entry, "the server's entry").what
            if not isinstance(what, Opening):
                raise EvidenceError("the entry shown is not an opening")
            theirs[what.header] = what
        for mine in self._unvouched():
            same = theirs.get(mine.header)
            if isinstance(mine, Agreed):
                if same and (same.lists, same.survivors) != (mine.lists, mine.survivors):
                    raise EvidenceError(f"it names other survivors of round {mine.round + 1}")
                continue  # it need not have been opened
            said = mine.survivors if isinstance(mine, Told) else mine.seeds_of
            if same is None or (same.lists, same.survivors) != (mine.lists, said):
                raise EvidenceError(f"it hides or alters the opening of round {mine.round + 1}")

    def _unvouched(self) -> list[Agreed | Unmasked | Told]:
        """What this silo agreed to, unmasked or was told since it last vouched, in this order."""
        assert self._log is not None
        found: list[Agreed | Unmasked | Told] = []
        for entry in reversed(self._log.entries):
            if isinstance(entry.what, Witnessed):
                break
            if isinstance(entry.what, Agreed | Unmasked | Told):
                found.append(entry.what)
        return found[::-1]


class AuthorityRecord:
    """The key holder's side of the evidence.

    Args:
        key: the authority's Ed25519 public key, 32 bytes; ``server``: the server's.
    """

    def __init__(
        self, log: EvidenceLog | None, *, key: bytes, roster: Roster, server: bytes = b""
    ) -> None:
        self._log = log
        self._key = key
        self._roster = roster
        self._server = server

    @property
    def marks(self) -> list[Mark]:
        """The newest sum in the log; none if there is none."""
        return _mark(self._log)

    def check_journal(self, journal: SiloStore, scheme: SchemeName) -> None:
        """Raises: StateError if ``journal`` does not know a step that the log knows."""
        check_journal(self._log, journal, scheme)

    def attempt(self, header: RoundHeader) -> None:
        """Before a key is made."""
        if self._log is None:
            return
        if not self._log.size:
            self._log.append(_opened(header, self._roster, self._server, self._key, None))
        self._log.append(
            Keyed(
                round=header.round,
                attempt=header.attempt,
                model=header.model_digest.hex(),
                values=header.parameters.values,
                header=header.digest.hex(),
            )
        )

    def said(self, header: RoundHeader, side: AuthoritySide) -> None:
        """After an answer was made, before it leaves."""
        seen = side.transcript
        if self._log is None or seen.word is None or seen.sealing is None:
            return
        self._log.append(
            Decrypted(
                round=header.round,
                attempt=header.attempt,
                header=seen.header.hex(),
                delivery=seen.delivery.hex(),
                survivors=list(seen.survivors),
                dropouts=list(seen.dropouts),
                lists=seen.lists.hex(),
                agreements={name: raw.hex() for name, raw in seen.agreements.items()},
                ciphertexts=_ciphertexts(seen.sealing),
                word=_word(seen.word),
            )
        )

    def refused(self, error: Exception) -> None:
        """A request was not answered."""
        _refused(self._log, error)


class ServerRecord:
    """The server's side of the evidence.

    Args:
        authority: the key holder's Ed25519 public key, where there is one.
        quorum: silos that must vouch for the log. Two quorums share an honest silo, so no two logs
            that contradict each other have one each.
    """

    def __init__(
        self,
        log: EvidenceLog | None,
        *,
        key: SigningKey | None,
        roster: Roster,
        quorum: int = 1,
        authority: bytes = b"",
    ) -> None:
        self._log = log
        self._authority = authority
        self._quorum = quorum
        self._key = key
        self._roster = roster
        self._proofs: dict[tuple[int, int], list[bytes]] = {}
        """(old, new size) → consistency proof: the same for most silos of a round."""
        self._openings: list[tuple[Opening, messages.Shown]] = []
        self._shown_at = (-1, -1)
        self._vouched: dict[str, int] = {}
        """Silo → entries of the head that it last vouched for."""
        if log is not None:
            names = {origin(log.study, name): name for name in roster.names}
            for head in log.heads():
                signers = [names[signer] for signer, _ in head.lines if signer in names]
                self._vouched |= dict.fromkeys(signers, head.size)

    @property
    def sealed(self) -> bool:
        """Whether nothing was written since a quorum of silos vouched for the log.

        What counts is the signatures here: a silo's reply may have been lost.
        """
        if self._log is None or not self._log.size:
            return True
        return len(self.vouching) >= self._quorum

    @property
    def vouching(self) -> set[str]:
        """The silos that vouch for the whole log, by their signatures."""
        if self._log is None or not self._log.size:
            return set()
        signers = {signer for signer, _ in self._log.head.lines}
        return {name for name in self._roster.names if origin(self._log.study, name) in signers}

    def delivery(self) -> tuple[str, messages.Shown] | None:
        """The newest head with its cosignatures, and the newest entry of a finished round in it;
        None before there is both."""
        if self._log is None or len(self.vouching) < self._quorum:
            return None
        ends = [entry.seq for entry in self._log.entries if isinstance(entry.what, Finished)]
        if not ends:
            return None
        leaves, at = self._log.leaves, ends[-1]
        (proof,) = inclusion_proofs(leaves, [at])
        return self._log.head.note, messages.Shown(at, leaves[at], proof)

    def check_base(self, base: bytes) -> None:
        """Before a run goes on. See :func:`_check_base`."""
        _check_base(self._log, base)

    def round(
        self,
        header: RoundHeader,
        base: bytes,
        layout: bytes,
        adapter: bytes | memoryview,
        mechanism: bytes,
        clip: Clip = None,
    ) -> None:
        """Before the model is sent."""
        if self._log is None or self._key is None:
            return
        if not self._log.size:
            sbom = bill_of_materials()
            write_durably(self._log.path.with_name(SBOM), sbom)
            self._log.append(_opened(header, self._roster, self._key.public, self._authority, sbom))
        self._log.append(_round(header, base, layout, adapter, mechanism, clip))

    def opening(self, header: RoundHeader, seen: Transcript) -> None:
        """Before anybody is asked to unmask."""
        if self._log is None:
            return
        self._log.append(
            Opening(
                round=header.round,
                attempt=header.attempt,
                header=seen.header.hex(),
                delivery=seen.delivery.hex(),
                survivors=list(seen.survivors),
                dropouts=list(seen.dropouts),
                lists=seen.lists.hex(),
                agreements={name: raw.hex() for name, raw in seen.agreements.items()},
                ciphertexts=None if seen.sealing is None else _ciphertexts(seen.sealing),
            )
        )

    def summed(self, header: RoundHeader, result: RoundResult) -> None:
        """Before the sum is used."""
        if self._log is None:
            return
        self._log.append(
            Summed(
                round=header.round,
                attempt=header.attempt,
                header=result.header_digest.hex(),
                survivors=list(result.survivors),
                sum=sha256(np.ascontiguousarray(result.sum, dtype="<i8").data.cast("B")).hex(),
                word=None if result.word is None else _word(result.word),
            )
        )

    def failed(self, round_: int, attempt: int, error: Exception) -> None:
        """An attempt failed."""
        if self._log is not None:
            name = type(error).__name__.lstrip("_")
            self._log.append(Failed(round=round_, attempt=attempt, error=name))

    def lost(self, round_: int) -> None:
        """The run goes on without this round's updates."""
        if self._log is not None:
            self._log.append(Lost(round=round_))

    def finished(
        self,
        round_: int,
        adapter: bytes | memoryview,
        directory: Path,
        score: float | None = None,
    ) -> None:
        """The round is done and its adapters are in ``directory``. Written once a round.

        Args:
            score: by which the study compares rounds, if it does.
        """
        if self._log is None or any(
            isinstance(entry.what, Finished) and entry.what.round == round_
            for entry in self._log.entries
        ):
            return
        digests = file_digests(directory)
        adapter_digest = sha256(adapter).hex()
        self._log.append(Finished(round=round_, adapter=adapter_digest, files=digests, score=score))

    def witness(self, silo: str) -> messages.Witness | None:
        """What ``silo`` is asked to vouch for; None if there is nothing."""
        if self._log is None or not self._log.size:
            return None
        leaves = self._log.leaves
        old = self._vouched.get(silo, 0)
        return messages.Witness(
            checkpoint=self._log.head.note,
            old=old,
            consistency=self._consistency(leaves, old),
            openings=self._shown(silo, old),
        )

    def _shown(self, silo: str, old: int) -> list[messages.Shown]:
        """The openings of the newest round that has any: a silo may know of an earlier attempt. And
        those that ``silo`` may have taken part in since it vouched for ``old`` entries."""
        assert self._log is not None
        at = self._log.size, min(self._vouched.get(name, 0) for name in self._roster.names)
        if self._shown_at != at:
            self._openings, self._shown_at = self._proven(at[1]), at
        newest = self._openings[-1][0].round if self._openings else -1
        return [
            shown
            for what, shown in self._openings
            if what.round == newest or (shown.index >= old and silo in what.survivors)
        ]

    def _proven(self, oldest: int) -> list[tuple[Opening, messages.Shown]]:
        """The openings of the newest round and from entry ``oldest`` on, with proofs."""
        assert self._log is not None
        found = [(e.seq, e.what) for e in self._log.entries if isinstance(e.what, Opening)]
        newest = found[-1][1].round if found else -1
        found = [(seq, what) for seq, what in found if seq >= oldest or what.round == newest]
        leaves = self._log.leaves
        proofs = inclusion_proofs(leaves, [seq for seq, _ in found])
        return [
            (what, messages.Shown(seq, leaves[seq], proof))
            for (seq, what), proof in zip(found, proofs, strict=True)
        ]

    def _consistency(self, leaves: list[bytes], old: int) -> list[bytes]:
        key = (old, len(leaves))
        if key not in self._proofs:
            self._proofs = {k: proof for k, proof in self._proofs.items() if k[1] == len(leaves)}
            self._proofs[key] = consistency_proof(leaves, old)
        return self._proofs[key]

    def witnessed(self, silo: str, reply: messages.Witnessed) -> bool:
        """Take a silo's cosignature; False if it must be asked again with another proof."""
        assert self._log is not None
        if not reply.cosignature:
            self._vouched[silo] = min(max(0, reply.size), self._log.size)
            return False
        name = origin(self._log.study, silo)
        head = self._log.head.with_line(name, reply.cosignature)
        try:
            head.verify_cosigned(name, self._roster.key(self._roster.index(silo)))
        except CryptoError as error:
            _messages.warning("%s: %s", silo, error)
            return True
        self._log.add_cosignature(head.size, name, reply.cosignature)
        self._vouched[silo] = head.size
        return True
