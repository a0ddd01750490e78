"""What a silo writes into its evidence log, and how it vouches for the server's."""

from __future__ import annotations

import contextlib
import time
from functools import lru_cache
from typing import Final

from msgspec import structs

from securefedcollm.aggregation import (
    Roster,
    RoundHeader,
    SchemeName,
    SiloSide,
    Step,
)
from securefedcollm.errors import (
    CryptoError,
    EvidenceError,
    RemoteProtocolError,
)
from securefedcollm.evidence.entries import (
    Agreed,
    Finished,
    Opening,
    Round,
    Told,
    Unmasked,
    Uploaded,
    Witnessed,
    decode_entry,
)
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.many import Many, agreements_of, are_many
from securefedcollm.evidence.merkle import (
    verify_consistency,
    verify_inclusion,
)
from securefedcollm.evidence.note import Checkpoint, cosign, origin, parse_checkpoint
from securefedcollm.federation import messages
from securefedcollm.federation.anchors import check_journal
from securefedcollm.federation.records.common import (
    SERVER,
    Clip,
    RoundRecord,
    newest_sum,
    note_refusal,
    word_of,
)
from securefedcollm.federation.silostore import Mark, SiloStore
from securefedcollm.primitives import SigningKey, sha256

MOST_HEADS: Final = 64
"""Heads of the server's log that a silo vouches for between two attempts of its own."""


class SiloRecord(RoundRecord):
    """A silo's side of the evidence.

    Args:
        server: the server's Ed25519 public key, 32 bytes.
        authority: the key holder's, where there is one.
    """

    def __init__(
        self,
        log: EvidenceLog,
        *,
        key: SigningKey,
        roster: Roster,
        server: bytes,
        authority: bytes = b"",
    ) -> None:
        super().__init__(log, roster=roster, server=server, authority=authority)
        self._key = key
        self._many = Many(roster) if are_many(len(roster)) else None
        self._header: RoundHeader | None = None
        self._tallies: dict[str, str] = {}
        """Attempt (header, hex) → root and set of the agreements that the server showed, hex."""

    @property
    def marks(self) -> list[Mark]:
        """The newest sum in the log; none if there is none."""
        return newest_sum(self._log)

    def check_journal(self, journal: SiloStore, scheme: SchemeName) -> None:
        """Raises: StateError if ``journal`` does not know a step that the log knows."""
        check_journal(self._log, journal, scheme)

    def round(
        self,
        header: RoundHeader,
        base: bytes,
        layout: bytes,
        adapter: bytes | memoryview,
        mechanism: bytes,
        clip: Clip = None,
    ) -> None:
        """As :meth:`.RoundRecord.round`; :meth:`said` is then about this attempt."""
        self._header = header
        super().round(header, base, layout, adapter, mechanism, clip)

    def said(self, side: SiloSide) -> None:
        """After the aggregation's answer was made, before it leaves."""
        if self._header is None:
            return
        seen, round_, attempt = side.transcript, self._header.round, self._header.attempt
        header, lists = seen.header.hex(), seen.lists.hex()
        survivors, dropouts = list(seen.survivors), list(seen.dropouts)
        if seen.tally and self._many is not None:
            self._tallies[header] = seen.tally.hex()
        match side.step:
            case Step.AGREE | Step.NOTE:
                self._log.append(
                    Uploaded(
                        round=round_, attempt=attempt, header=header, delivery=seen.delivery.hex()
                    )
                )
            case Step.UNMASK if self._header.on_graph:
                pass  # a challenge says nothing about the silo
            case Step.UNMASK | Step.CHALLENGE:
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
                        word=word_of(seen.word),
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
        note_refusal(self._log, error)

    def countersign(self, request: messages.Witness) -> messages.Witnessed:
        """Vouch for the server's log: it extends what this silo vouched for before, and says of
        every opening since then what this silo saw.

        Raises:
            RemoteProtocolError: it does not, or this silo has no log yet. Adversary: a server that
                rewrites its history, keeps one log for each reader, or fills this disk with heads.
        """
        if not self._log.size:
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
            self._tallies.clear()
        line = cosign(head, self._log.origin, self._key, int(time.time()))
        return messages.Witnessed(head.size, line)

    def finished(self, delivery: messages.Deliver, quorum: int) -> Finished:
        """The entry of the server's log by which a round ended with the adapter of ``delivery``.

        Adversary: a server that hands one silo another adapter than it shows the others and the
        auditors, or an old one. So the head must be the one that this silo vouched for last, and a
        quorum of silos must vouch for it (two quorums share an honest silo). The round must not be
        before the newest that this silo knows of.

        Raises:
            RemoteProtocolError: its log does not say so.
        """
        try:
            if not self._log.size:
                raise EvidenceError("this silo vouches for none")
            last, head = self._vouched()[0], self._head(delivery.checkpoint)
            if (head.size, head.root.hex()) != (last.size, last.root):
                raise EvidenceError("its head is not the one that this silo vouched for last")
            if (count := _cosigners(delivery.checkpoint, self._log.study, self._roster)) < quorum:
                raise EvidenceError(f"{count} silos vouch for it, {quorum} are needed")
            shown = delivery.finished
            verify_inclusion(shown.entry, shown.index, head.size, shown.inclusion, head.root)
            what = decode_entry(shown.entry, "the server's entry", self._many).what
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
        head = parse_checkpoint(note)
        if head.origin != origin(self._log.study, SERVER):
            raise EvidenceError("the checkpoint is of another log")
        head.verify(self._server)
        return head

    def _vouched(self) -> tuple[Witnessed, int]:
        """The newest head vouched for, and how many there are since the newest attempt."""
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
        """Compare the openings since this silo last vouched in the server's log and in its own.

        Adversary: a server that hides an opening in which this silo took part, or says that others
        were in the sum; whatever openings of other rounds it shows instead. And one that has this
        silo challenge some agreements, and logs others. Only in memory is what was challenged.
        """
        theirs: dict[str, Opening] = {}
        for shown in request.openings:
            verify_inclusion(shown.entry, shown.index, head.size, shown.inclusion, head.root)
            what = decode_entry(shown.entry, "the server's entry", self._many).what
            if not isinstance(what, Opening):
                raise EvidenceError("the entry shown is not an opening")
            tally = self._tallies.get(what.header)
            if tally is not None and tally != agreements_of(shown.entry):
                raise EvidenceError(
                    f"it names other agreements to sum {what.round + 1} than it showed this silo"
                )
            theirs[what.header] = what
        for mine in self._unvouched():
            same = theirs.get(mine.header)
            if isinstance(mine, Agreed):
                if same and (same.lists, same.survivors) != (mine.lists, mine.survivors):
                    raise EvidenceError(f"it names other survivors of sum {mine.round + 1}")
                continue  # it need not have been opened
            said = mine.survivors if isinstance(mine, Told) else mine.seeds_of
            if same is None or (same.lists, same.survivors) != (mine.lists, said):
                raise EvidenceError(f"it hides or alters the opening of sum {mine.round + 1}")

    def _unvouched(self) -> list[Agreed | Unmasked | Told]:
        """What this silo agreed to, unmasked or was told since it last vouched, in this order."""
        found: list[Agreed | Unmasked | Told] = []
        for entry in reversed(self._log.entries):
            if isinstance(entry.what, Witnessed):
                break
            if isinstance(entry.what, Agreed | Unmasked | Told):
                found.append(entry.what)
        return found[::-1]


@lru_cache(maxsize=2)  # many silos of one simulation are shown the same head
def _cosigners(note: str, study: bytes, roster: Roster) -> int:
    """How many silos vouch for a head of the server's log."""
    head, vouching, tried = parse_checkpoint(note), set[str](), set[str]()
    keys = {origin(study, name): roster.key(roster.index(name)) for name in roster.names}
    for line in head.lines:
        if line[0] in keys and line[0] not in tried:
            # Adversary: a server that repeats one line, each of which would take a verification.
            tried.add(line[0])
            with contextlib.suppress(CryptoError):
                structs.replace(head, lines=(line,)).verify_cosigned(line[0], keys[line[0]])
                vouching.add(line[0])
    return len(vouching)
