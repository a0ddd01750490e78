"""Members that ask each other over the network: ports, and what a silo with documents agrees to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from securefedcollm.errors import ConfigError, RemoteProtocolError
from securefedcollm.evidence.entries import Entry
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.engines import Engine
from securefedcollm.federation.files import make_directory
from securefedcollm.federation.messages import MAX_FRAME
from securefedcollm.federation.plan import run_key
from securefedcollm.federation.questions.agreed import pinned_terms, plan_of
from securefedcollm.federation.questions.answering import Answers, OwnRecords
from securefedcollm.federation.questions.begun import Everybody, begin_log
from securefedcollm.federation.questions.counter import Counter, ask_process
from securefedcollm.federation.questions.inquiry import Answered, check_question, judge
from securefedcollm.federation.questions.letters import of_documents
from securefedcollm.federation.questions.port import Chair, QuestionPort
from securefedcollm.federation.questions.quota import StoredQuota, beside
from securefedcollm.federation.questions.relay import Relay, WithServer
from securefedcollm.federation.questions.stock import Documents, Stock
from securefedcollm.federation.records import SERVER
from securefedcollm.federation.roles.member import Member, run_in
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.silo import CLOCK, Clock
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.retrieval import Index, PreparedShelf
from securefedcollm.study import Study, digest

if TYPE_CHECKING:
    from securefedcollm.federation.questions.space import Space

OnEntry = Callable[[Entry], None]


@dataclass(frozen=True)
class ShelfTerms:
    """What an operator agrees to by putting a shelf at the members' disposal.

    Adversary: the author of the study and the askers. The silo's machine computes all of this from
    its own index, its own count and the signed study.
    """

    study: str
    digest: str
    server: str
    askers: list[str]
    index: str
    """Its fingerprint."""
    passages: int
    documents: int
    """Passages that the shelf is padded to."""
    fetched: int
    questions: int
    """Of one asker, at most, with all that the shelf's count knows."""
    dimension: int
    spent: dict[str, int]
    """Asker → questions that were counted, in all runs and studies."""
    together: int
    """Askers that may pool what they are told: the server and the silos that may collude with it,
    or one silo more where they are all silos."""
    telling: int
    """Questions that tell every embedding on the shelf, whoever asks them."""

    @property
    def pooled(self) -> int:
        """Questions of all members that may collude."""
        return self.questions * self.together

    @property
    def reads_all(self) -> bool:
        """Whether so many questions may tell members that collude every embedding on the shelf."""
        return self.pooled >= self.telling


@dataclass(frozen=True)
class OwnShelf:
    """A silo's shelf, ready to answer, and what that means."""

    stock: Stock
    terms: ShelfTerms

    def close(self) -> None:
        """Close the count, and give the memory back."""
        self.stock.quota.close()
        self.stock.shelf.close()


def open_shelf(member: Member, index: Path, most: int | None = None) -> OwnShelf:
    """Read an index, its count, and what the study says of it.

    Args:
        most: the operator's own limit on one asker's questions, below the study's.

    Raises:
        ConfigError: the index does not fit the study, or ``most`` is above the study's limit.
        DataError: the index is damaged.
        StateError: index or count cannot be read.
    """
    study, plan = member.study, plan_of(member.study)
    if most is not None and most > plan.questions:
        raise ConfigError(
            f"{most} is above the {plan.questions} questions of the study",
            where="--questions",
            hint="give a lower limit, or none",
        )
    limit = plan.questions if most is None else most
    terms = pinned_terms(study)
    found = Index.load(index, terms)
    quota = StoredQuota(beside(index), limit)
    askers = sorted({SERVER, *member.roster.names} - {member.name})
    about = ShelfTerms(
        study=study.study,
        digest=digest(study).hex(),
        server=next(p.name for p in study.roster if p.role == "server"),
        askers=askers,
        index=found.fingerprint.hex(),
        passages=len(found),
        documents=plan.documents,
        fetched=plan.fetched,
        questions=limit,
        dimension=plan.dimension,
        spent={asker: quota.spent(asker) for asker in askers},
        together=min(study.silos.colluders + 1, len(askers)),
        telling=terms.telling,
    )
    return OwnShelf(Stock(PreparedShelf(found, terms), quota), about)


def question_port(
    member: Member,
    counter: Counter,
    own: Stock | OwnRecords | None = None,
    on_entry: OnEntry | None = None,
    clock: Clock = CLOCK,
) -> QuestionPort:
    """The side of a silo, or of the server, in questions: it answers from its ``own`` documents or
    records, and asks what is handed in at ``counter``.

    Raises:
        ConfigError: the study has no questions, or pins no encoder and map.
    """
    silos = dict(zip(member.roster.names, member.roster.keys, strict=True))
    name = SERVER if member.role == "server" else member.name
    askers = {SERVER: member.server, **silos}
    chair = Chair(
        study=digest(member.study),
        name=name,
        key=member.key,
        silos={silo: key for silo, key in silos.items() if silo != name},
        askers={asker: key for asker, key in askers.items() if asker != name},
    )
    return QuestionPort(
        chair,
        partial(_enter, member, name, on_entry),
        matter_of(member, own),
        counter=counter,
        clock=clock,
    )


def matter_of(member: Member, own: Stock | OwnRecords | None = None) -> Documents | Answers:
    """What the study's members ask each other, and what this one answers from.

    Raises:
        ConfigError: the study has no questions, or pins no encoder and map.
    """
    if plan_of(member.study).mode == "answers":
        return Answers(member.study, member.roster, own if isinstance(own, OwnRecords) else None)
    stock = own if isinstance(own, Stock) else None
    return Documents(pinned_terms(member.study), stock)


def _enter(member: Member, name: str, on_entry: OnEntry | None, run: bytes) -> EvidenceLog:
    """This member's log of the run, which it takes part in from now on, and in no other.

    Adversary: a server that shows members different runs of a study: nothing verifies then, and
    later this silo would be in a run whose evidence began elsewhere.
    """
    home = make_directory(member.run / (name if name == SERVER else f"silos/{name}"))
    if name != SERVER:
        store = SiloStore(home)
        mine = store.record(run_key(member.study), run)
        store.close()
        if mine != run:
            raise RemoteProtocolError(
                "asked for a second run of a study that this participant is in",
                peer="server",
                hint="was the server's home lost? Agree on a new study",
            )
    everybody = Everybody(
        digest(member.study),
        member.roster,
        member.server,
        member.authority.key if member.authority else b"",
    )
    return begin_log(home, name, member.key, run, everybody, on_entry)


def question_relay(member: Member, engine: Engine, port: QuestionPort) -> Relay:
    """The server's side: it carries letters between silos, and asks by ``port``.

    Raises:
        ConfigError: as :func:`question_port`.
        StateError: the run's state cannot be read or written.
    """
    known = (member.run / "server" / "state.json").exists()
    silos = list(member.roster.names)
    return Relay(
        engine=WithServer(engine, SERVER, port),
        run=RunStore(member.run, digest(member.study), resume=known).run_id,
        askers=[SERVER, *silos],
        silos=silos,
        sizes=matter_of(member).sizes,
    )


def ask_from(study: Study, home: Path, question: str, space: Space) -> tuple[Answered, Path]:
    """Ask over the network, through the process that runs in a member's home.

    Returns:
        what was found, and the study's directory in the home, which has this member's evidence.

    Raises:
        ConfigError: the study pins no encoder and map, or no process runs there.
        DataError: the question has no words that the encoder knows.
        TransportError: the process has ended, or the server carries no questions.
    """
    check_question(question)
    terms, run = pinned_terms(study), run_in(home, study)
    (query,) = space.embed([question])
    started = time.perf_counter()
    result = ask_process(run, query, 5 * of_documents(terms).seconds)
    seconds = time.perf_counter() - started
    found = judge(result.fetched, query, space.embed, terms.fetched)
    return Answered(found, result.asked, plan_of(study).questions, seconds), run


def largest_call(member: Member) -> int:
    """Bytes of the largest call to a member, or reply of one, in questions.

    Raises:
        ConfigError: no frame may be so long; or as :func:`question_port`.
    """
    members = len(member.roster.names) + 1
    largest = matter_of(member).sizes.largest(members)
    if largest > MAX_FRAME:
        raise ConfigError(
            f"{members} members with shelves of this size may send each other "
            f"{largest / 2**30:.1f} GiB at once, and {MAX_FRAME / 2**30:.0f} GiB are the most",
            where="retrieval.documents",
            hint="agree on fewer documents, smaller blocks or fewer of them, or several consortia",
        )
    return largest
