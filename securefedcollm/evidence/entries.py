"""The entries of a log: one frozen type per kind of event, in one canonical spelling (RFC 8785).

Deliberately absent, because a log is made to be shown: keys, shares, seeds and vectors; losses,
norms, metrics and batch sizes (but for one number a round on public questions, where the study lets
it choose among rounds, and the noised counts of a validation); the reasons of refusals (they depend
on private data and on other studies);
the data set's fingerprint and the ledger's bare head (computed from records without a secret, so a
guessed record could be confirmed by them): both appear only under the log's own blind. A *silo's*
log does tell its readers the silo's noise multiplier and sampling rate, and so, with the study's
batch size, how many records it has. The server never gets a silo's log. Of questions to documents
a log says who asked whom, when and how often.

Digests are SHA-256 in hex. ``round`` is the number of the secure sum, from 0, as in its header: one
a round, or one an optimiser step where these are taken jointly; and one more where a round ends
with a validation.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from securefedcollm.aggregation.header import MAX_COHORT
from securefedcollm.errors import EvidenceError
from securefedcollm.evidence.canonical import canonical as canonical
from securefedcollm.evidence.canonical import decode_canonical as decode_canonical
from securefedcollm.evidence.fields import (
    Content,
    Count,
    Hex,
    Member,
    Names,
    Positive,
    Short,
    Signature,
    Who,
    Whole,
)
from securefedcollm.evidence.fields import Slip as Slip
from securefedcollm.evidence.many import SETS, Many
from securefedcollm.evidence.votes import Polled as Polled
from securefedcollm.evidence.votes import Tallied as Tallied
from securefedcollm.evidence.votes import Voted as Voted
from securefedcollm.evidence.votes import Voting as Voting
from securefedcollm.foreign import nested_deeper

MAX_ENTRY = 256 << 10
"""Bytes of one entry: an opening agreed to by 128 silos takes 40 kB."""
_DEEPEST = 16


class Opened(Content, frozen=True, tag="opened"):
    """The first entry: which study and run, who takes part, which code runs here.

    ``code`` is the digest of this package's source files; ``sbom`` that of the server's bill of
    materials.
    """

    study: Hex
    run: Short
    roster: Annotated[list[Member], Meta(max_length=MAX_COHORT + 2)]
    version: str
    code: Hex
    sbom: Hex | None = None


class Round(Content, frozen=True, tag="round"):
    """An attempt at a round begins: at the server before the model is sent, at a silo before it
    trains. ``model`` = H(base, layout, adapter, mechanism); ``header`` binds it and all else.

    ``mechanism``: how the sum is noised, where silos share the noise. ``clip``: the clip norm and
    the count's part, where they adapt from round to round; ``mechanism`` binds them.
    """

    round: Count
    attempt: Count
    base: Hex
    layout: Hex
    adapter: Hex
    model: Hex
    values: Count
    header: Hex
    mechanism: Hex | None = None
    clip: tuple[Positive, Positive] | None = None


class Uploaded(Content, frozen=True, tag="uploaded"):
    """Silo: the protected vector is about to leave: masked for the dealers of ``delivery``, or
    encrypted as one of the ciphertexts of which ``delivery`` is the transcript."""

    round: Count
    attempt: Count
    header: Hex
    delivery: Hex


class Agreed(Content, frozen=True, tag="agreed"):
    """Silo: signed that exactly ``survivors`` are in the sum. ``lists`` is what was signed."""

    round: Count
    attempt: Count
    header: Hex
    delivery: Hex
    survivors: Names
    dropouts: Names
    lists: Hex


class Unmasked(Content, frozen=True, tag="unmasked"):
    """Silo: the dealers of whose self-mask seed, or mask key, it gave away its share. On a graph it
    holds shares of those only that drew it."""

    round: Count
    attempt: Count
    header: Hex
    lists: Hex
    seeds_of: Names
    keys_of: Names


class Root(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A silo's commitment to its ciphertext, and its signature over it."""

    root: Hex
    signature: Signature


class Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The authority's signature over what it opened; ``share``: SHA-256 of what it answered."""

    share: Hex
    signature: Signature


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The authority's key of an attempt: SHA-256 of it, and the authority's signature."""

    part: Hex
    signature: Signature


class Ciphertexts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """CKKS: the content that ``delivery`` digests, and that the agreements sign.

    ``key``: id of the keys. ``offer``: the authority's, where it holds them.
    """

    key: Hex
    roots: Annotated[dict[Who, Root], Meta(max_length=128)]
    offer: Offer | None = None


class Told(Content, frozen=True, tag="told"):
    """Silo: saw the authority's word that it opened the sum of exactly ``survivors``."""

    round: Count
    attempt: Count
    header: Hex
    delivery: Hex
    survivors: Names
    dropouts: Names
    lists: Hex
    word: Word


class Keyed(Content, frozen=True, tag="keyed"):
    """Authority: an attempt begins, for which it is asked for a key. Of the global model it knows
    the digest that silos sign, and of their vectors the length."""

    round: Count
    attempt: Count
    model: Hex
    values: Count
    header: Hex


class Decrypted(Content, frozen=True, tag="decrypted"):
    """Authority: before its answer leaves; the ciphertexts that it was shown, and its own word."""

    round: Count
    attempt: Count
    header: Hex
    delivery: Hex
    survivors: Names
    dropouts: Names
    lists: Hex
    agreements: Annotated[dict[Who, Signature], Meta(max_length=128)]
    ciphertexts: Ciphertexts
    word: Word


class Opening(Content, frozen=True, tag="opening"):
    """Server: before anybody is asked to unmask; with the survivors' signatures over ``lists``, or
    over their verdicts on, or their consent to, ``ciphertexts``."""

    round: Count
    attempt: Count
    header: Hex
    delivery: Hex
    survivors: Names
    dropouts: Names
    lists: Hex
    agreements: Annotated[dict[Who, Signature], Meta(max_length=MAX_COHORT)]
    ciphertexts: Ciphertexts | None = None


class Summed(Content, frozen=True, tag="summed"):
    """Server: the opened sum, before it is used. ``sum`` = H(int64 little-endian). ``word``: the
    authority's, where one holds the key."""

    round: Count
    attempt: Count
    header: Hex
    survivors: Names
    sum: Hex
    word: Word | None = None


class Lost(Content, frozen=True, tag="lost"):
    """Server: the round's sum was being opened and cannot be; its updates are lost."""

    round: Count


class Failed(Content, frozen=True, tag="failed"):
    """Server: an attempt failed. ``error`` is a class name of the error tree."""

    round: Count
    attempt: Count
    error: Who


class Finished(Content, frozen=True, tag="finished", omit_defaults=True):
    """Server: a round is done, ``round`` being its last sum. ``adapter`` is what the next round
    broadcasts; ``files`` the digests of the adapters saved, by path. ``score``: loss (nats) or
    accuracy on public questions, by which the study's ``keep`` compares rounds; left out if there
    is none. ``counts``: right and wrong, as the round's validation opened them, noise included, in
    integers of the mechanism; left out if there was none. A ``score`` may follow from them."""

    round: Count
    adapter: Hex
    files: Annotated[dict[str, Hex], Meta(max_length=64)]
    score: float | None = None
    counts: tuple[Whole, Whole] | None = None


class Spent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """(ε, δ) of everything the silo's ledger counts on these data, and the accountant that computed
    it."""

    epsilon: Annotated[float, Meta(ge=0)]
    delta: Annotated[float, Meta(gt=0, lt=1)]
    accountant: Who


class _Charge(Content, frozen=True):
    """``account``: data set and unit, under the log's blind; ``ledger``: the ledger's head after
    the step, likewise; ``training``: number of the training in its round."""

    account: Short
    unit: Who
    round: Count
    training: Count
    ledger: Hex


class Reserved(_Charge, frozen=True, tag="reserved"):
    """Silo: the worst case was charged, before training."""

    events: list[dict[str, Any]]
    epsilon: Annotated[float, Meta(gt=0)]
    delta: Annotated[float, Meta(gt=0, lt=1)]


class Released(_Charge, frozen=True, tag="released"):
    """Silo: from here on bytes may have left; the charge stays."""


class Settled(_Charge, frozen=True, tag="settled"):
    """Silo: the actual releases. ``spent`` is given with every sum that may be the run's last."""

    events: list[dict[str, Any]]
    spent: Spent | None = None


class Voided(_Charge, frozen=True, tag="voided"):
    """Silo: a reservation given back, from which nothing had left."""


class Refused(Content, frozen=True, tag="refused"):
    """Silo: the server's request was not answered. ``error`` is a class name; the reason stays in
    the silo's own log file."""

    error: Who


class Witnessed(Content, frozen=True, tag="witnessed"):
    """Silo: vouched for this head of the server's log, which extends the one before."""

    size: Count
    root: Hex


class Audited(Content, frozen=True, tag="audited"):
    """The keeper of this log carried out a privacy audit. ``study`` and ``code``: digests of what
    was attacked; ``claimed`` and ``bound``: ε by the accountant and at least, at ``delta``.

    The figures depend on the attacked records, for which no ledger was charged: audit only data
    that may be used in this way.
    """

    audit: Who
    study: Hex
    code: Hex
    setting: Annotated[str, Meta(max_length=400)]
    claimed: Annotated[float, Meta(ge=0)] | None
    bound: Annotated[float, Meta(ge=0)] | None
    delta: Annotated[float, Meta(gt=0, lt=1)]
    held: bool
    figures: Annotated[dict[Who, float], Meta(max_length=32)]


class Answers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a silo sent for a question, as far as it came, and the selection between the two."""

    scores: Slip
    selection: Slip | None = None
    blocks: Slip | None = None


class Asked(Content, frozen=True, tag="asked"):
    """Asker: a question is about to leave. ``questions``: silo → digest of header and frame, by
    which the silo's log names it. ``terms``: digest of the sizes, encoder and reduction."""

    terms: Hex
    questions: Annotated[dict[Who, Hex], Meta(max_length=128)]


class Heard(Content, frozen=True, tag="heard"):
    """Asker: what came back for the question of its own entry ``asked``, before it is used. A silo
    that is left out did not answer."""

    asked: Count
    answers: Annotated[dict[Who, Answers], Meta(max_length=128)]


class Counted(Content, frozen=True, tag="counted"):
    """Silo: a question is counted, and its scores are about to leave. It is ``asker``'s question
    ``number`` to this shelf, from 1. A number is missing where the silo broke off between counting
    and answering, or where another run asked the shelf.

    ``question``: the asker's frame. ``index``: fingerprint of the shelf. ``scores``: digest of all
    frames up to the scores.
    """

    asker: Who
    number: Annotated[int, Meta(ge=1, lt=2**53)]
    terms: Hex
    index: Hex
    question: Slip
    scores: Hex


class Served(Content, frozen=True, tag="served"):
    """Silo: the passages of ``question`` are about to leave. ``blocks``: digest of all frames."""

    question: Hex
    blocks: Hex


What = (
    Opened
    | Round
    | Uploaded
    | Agreed
    | Unmasked
    | Told
    | Keyed
    | Decrypted
    | Opening
    | Summed
    | Lost
    | Failed
    | Finished
    | Reserved
    | Released
    | Settled
    | Voided
    | Refused
    | Witnessed
    | Audited
    | Asked
    | Heard
    | Counted
    | Served
    | Polled
    | Tallied
    | Voting
    | Voted
)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Entry ``seq`` (from 0) of ``owner``'s log; ``time`` by the owner's clock, UTC."""

    seq: Count
    time: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ(?!\n)$")]
    owner: Who
    what: What

    @property
    def place(self) -> str:
        """How a finding names this entry."""
        return f"{self.owner}#{self.seq} ({self.what.__struct_config__.tag})"


def encode_entry(entry: Entry, many: Many | None = None) -> bytes:
    """RFC 8785 canonical JSON: the leaf of the Merkle tree.

    Args:
        many: the spelling of a log of more than 128 silos.

    Raises:
        EvidenceError: longer than :data:`MAX_ENTRY`.
    """
    plain = msgspec.to_builtins(entry)
    if many is not None:
        plain["what"] = many.short(plain["what"])
    raw = canonical(plain)
    if len(raw) > MAX_ENTRY:
        raise EvidenceError(f"an evidence entry of {len(raw)} bytes is too long")
    return raw


def decode_entry(raw: bytes, place: str, many: Many | None = None) -> Entry:
    """Inverse of :func:`encode_entry`.

    Adversary: the author of the file. Unknown kinds and fields, duplicate keys, numbers that two
    readers could read differently and any second spelling are refused: the entry must re-encode to
    itself.

    Raises:
        EvidenceError: naming ``place``.
    """
    try:
        if len(raw) > MAX_ENTRY or nested_deeper(raw, _DEEPEST):
            raise ValueError("too long, or nested too deeply")
        entry, plain = _decode(raw) if many is None else _decode_many(raw, many)
        if canonical(plain) == raw:
            return entry
        why = "not in its canonical form"
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        why = str(error)[:200]
    raise EvidenceError(
        f"{place}: not an entry of an evidence log ({why})",
        hint="it was changed, or written by another version",
    )


def _decode(raw: bytes) -> tuple[Entry, Any]:
    """The entry, and what it re-encodes to."""
    entry = msgspec.json.decode(raw, type=Entry)
    return entry, msgspec.to_builtins(entry)


def _decode_many(raw: bytes, many: Many) -> tuple[Entry, Any]:
    """The same in a log of more than 128 silos."""
    found = msgspec.json.decode(raw, type=dict[str, Any])
    what = found.get("what")
    if not isinstance(what, dict):
        raise ValueError("without content")
    long = many.long(what)
    entry = msgspec.convert({**found, "what": long}, Entry)
    plain = msgspec.to_builtins(entry)
    plain["what"] |= {key: what[key] for key in long if long[key] is not what[key]}
    # One list in memory for the same set of silos in all entries.
    shared: dict[str, Any] = {key: long[key] for key in SETS if key in long}
    if isinstance(entry.what, Opened):
        shared = {"roster": many.whole(entry.what.roster)}
    what = msgspec.structs.replace(entry.what, **shared)
    return msgspec.structs.replace(entry, what=what), plain
