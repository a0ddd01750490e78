"""Signatures: the study, the logs and their heads, the witnesses, the software."""

from __future__ import annotations

import json
from collections import defaultdict

from securefedcollm.errors import ConfigError, CryptoError
from securefedcollm.evidence.entries import Finished, Opened, Witnessed
from securefedcollm.evidence.note import Checkpoint, origin
from securefedcollm.primitives import sha256
from securefedcollm.study.signing import check_envelope, verify_signatures
from securefedcollm_audits.verification.case import SERVER, Case, NotCovered, count, of
from securefedcollm_audits.verification.verdict import Check, Faults


def study_signed(case: Case, wrong: Faults) -> str:
    """Adversary: somebody who writes a study in other people's names, or changes a signed one."""
    study, envelope = case.study, case.bundle.envelope
    if not study.roster:
        if envelope is not None:
            wrong("study.signatures.json", "signatures on a study that names no participants")
        raise NotCovered("the study names no participants: identities were made for this run")
    if envelope is None:
        wrong("study.signatures.json", "missing: nobody signed the study")
        return ""
    try:
        check_envelope(envelope, study, "study.signatures.json")
        signed = verify_signatures(study, envelope)
    except (ConfigError, CryptoError) as error:
        wrong("study.signatures.json", error.message)
        return ""
    for name, done in signed.items():
        if not done:
            wrong("study.signatures.json", f"{name} has not signed")
    return f"{count(len(signed), 'participant')} signed {case.digest.hex()[:16]}…"


def membership(case: Case, wrong: Faults) -> str:
    """Adversary: a log of another study or run, slipped in; a silo that is not on the roster."""
    said = None
    for name, log in case.logs.items():
        for seq, entry in enumerate(log):
            if (entry.seq, entry.owner) != (seq, name):
                wrong(entry, f"stands in the log of {name} at {seq}")
        if name not in case.opened:
            wrong(log[0] if log else f"logs/{name}.jsonl", "the log does not begin with `opened`")
            continue
        mine = case.opened[name]
        said = said or mine
        if mine.study != case.digest.hex():
            wrong(log[0], "is of another study")
        if mine.run != said.run:
            wrong(log[0], f"is of run {mine.run[:8]}…, others of {said.run[:8]}…")
        if mine.roster != said.roster:
            wrong(log[0], "names other participants or keys than the others")
        for entry, _ in of(log[1:], Opened):
            wrong(entry, "a log is opened once")
    _roster(case, wrong)
    found = ", ".join(case.logs)
    return f"run {case.run.hex()[:8]}…: logs of {found}"


def _roster(case: Case, wrong: Faults) -> None:
    """The participants of the first log are those of the study, or as many."""
    for name, opened in list(case.opened.items())[:1]:
        entry = case.logs[name][0]
        listed = {(m.role, m.key) for m in opened.roster}
        silos = [m.name for m in opened.roster if m.role == "silo"]
        agreed = {(p.role, p.key) for p in case.study.roster}
        if agreed and listed != agreed:
            wrong(entry, "its participants are not those of the signed study")
        if len(silos) != case.study.silos.count:
            wrong(entry, f"{len(silos)} silos, the study has {case.study.silos.count}")
        offices = ["server", "authority"] if case.keyed else ["server"]
        if sorted(m.role for m in opened.roster if m.role != "silo") != sorted(offices):
            wrong(entry, f"the study has, beside its silos, one {' and one '.join(offices)}")
        case.roster  # noqa: B018 - raises for names or keys that occur twice
    for name, log in case.logs.items():
        if case.key(name) is None:
            wrong(log[0] if log else name, f"{name} is no participant")


def heads(case: Case, wrong: Faults) -> str:
    """Adversary: somebody who had the files in between, without the owner's key; and the owner, who
    rewrote entries under an earlier head."""
    signed = 0
    for name, found in case.bundle.heads.items():
        place = f"heads/{name}.json"
        roots, key, size = case.roots(name), case.key(name), 0
        for head in found:
            if head.origin != origin(case.digest, name):
                wrong(place, f"the head of {head.size} entries is of another log")
            elif not size < head.size < len(roots) or roots[head.size] != head.root:
                wrong(place, f"the log is not what was signed at {head.size} entries")
            elif key is None or not _verifies(head, key):
                wrong(place, f"the head of {head.size} entries is not signed by {name}")
            _cosignatures(case, head, place, wrong)
            signed += len(head.lines)
            size = head.size
        if size != len(case.logs[name]):
            wrong(place, f"{len(case.logs[name])} entries, of which {size} are signed")
    return f"{count(signed, 'signature')} over {count(len(case.logs), 'log')}, nothing rewritten"


def _verifies(head: Checkpoint, key: bytes) -> bool:
    try:
        head.verify(key)
    except CryptoError:
        return False
    return head.lines[0][0] == head.origin  # the owner's line comes first


def _cosignatures(case: Case, head: Checkpoint, place: str, wrong: Faults) -> None:
    """Every further line is a silo's, and verifies; there is one of each."""
    seen = {head.origin}
    for line in head.lines[1:]:
        signer = line[0]
        try:
            if signer in seen:
                raise CryptoError("repeated signer")
            case.vouched(head, line)
        except CryptoError:
            name = signer.rpartition("/")[2]
            wrong(place, f"the cosignature of {name} at {head.size} entries does not verify")
        seen.add(signer)


def witnesses(case: Case, wrong: Faults) -> str:
    """Adversary: a server that keeps one log for each reader. Two quorums share an honest silo,
    which vouches only for logs that extend each other."""
    case.need_server()
    needed, total = case.study.threshold, case.study.silos.count
    best, most = 0, 0
    for head in case.bundle.heads[SERVER]:
        vouching = len({signer for signer, _ in head.lines[1:]})
        if vouching >= needed:
            best, most = head.size, vouching
    finished = [entry for entry, _ in of(case.server, Finished)]
    if not finished:
        raise NotCovered("no round is finished yet")
    for entry in finished:
        if entry.seq >= best:
            wrong(entry, f"no {needed} of {total} silos vouch for the log up to here")
    return f"{most} of {total} silos cosigned the head of {best} entries; {needed} are needed"


def one_history(case: Case, wrong: Faults) -> str:
    """Adversary: a server that showed one silo another log than the others."""
    told: dict[int, dict[str, list[str]]] = defaultdict(dict)
    vouched: dict[str, set[int]] = {}
    for name, log in case.need_silos().items():
        last, vouched[name] = 0, set()
        for entry, what in of(log, Witnessed):
            if what.size <= last:
                wrong(entry, f"vouches for {what.size} entries after {last}")
            last = what.size
            vouched[name].add(what.size)
            told[what.size].setdefault(what.root, []).append(name)
            roots = case.roots(SERVER) if case.server else []
            if roots and not (what.size < len(roots) and roots[what.size].hex() == what.root):
                wrong(entry, f"was shown another server log of {what.size} entries")
    for size, roots_of in told.items():
        if len(roots_of) > 1:
            sides = " and ".join("/".join(names) for names in roots_of.values())
            wrong("witnessed", f"the server showed {sides} different logs of {size} entries")
    _cosigners(case, vouched, wrong)
    if not told:
        raise NotCovered("no silo has vouched for the server's log yet")
    heads_seen = sum(len(sizes) for sizes in vouched.values())
    return f"{count(heads_seen, 'head')} in the logs of {count(len(vouched), 'silo')}, one history"


def _cosigners(case: Case, vouched: dict[str, set[int]], wrong: Faults) -> None:
    for head in case.bundle.heads.get(SERVER, []):
        for signer, _ in head.lines[1:]:
            name = signer.rpartition("/")[2]
            if name in vouched and head.size not in vouched[name]:
                wrong(
                    f"heads/{SERVER}.json",
                    f"{name} cosigned {head.size} entries, but its own log does not say so",
                )


def same_code(case: Case, wrong: Faults) -> str:
    """No adversary: participants who run different code by mistake. A liar can write any digest."""
    first = None
    for name, opened in case.opened.items():
        first = first or opened
        if (opened.version, opened.code) != (first.version, first.code):
            wrong(case.logs[name][0], f"runs {opened.version}, source {opened.code[:12]}…")
    if first is None:
        raise NotCovered("no log says which code ran")
    return f"version {first.version}, source sha256:{first.code[:16]}… everywhere"


def bill_of_materials(case: Case, wrong: Faults) -> str:
    """Adversary: somebody who swaps in a bill of materials without the vulnerable library."""
    case.need_server()
    raw, opened = case.bundle.sbom, case.opened.get(SERVER)
    if raw is None or opened is None or opened.sbom is None:
        wrong("sbom.json", "missing")
        return ""
    if sha256(raw).hex() != opened.sbom:
        wrong("sbom.json", "is not the one that the server's log names")
        return ""
    document = json.loads(raw)
    parts = document["components"]
    if document["bomFormat"] != "CycloneDX" or not parts:
        wrong("sbom.json", "is no CycloneDX bill of materials, or an empty one")
    if document["metadata"]["component"]["version"] != opened.version:
        wrong("sbom.json", f"is of another version than {opened.version}")
    for part in parts:
        if not part["name"] or not part["version"]:
            wrong("sbom.json", "a component without name or version")
    return f"CycloneDX {document['specVersion']}, {count(len(parts), 'component')}"


CHECKS = (
    Check("study-signed", "Every participant signed this study", study_signed),
    Check("membership", "All logs are of one study, run and set of participants", membership),
    Check("heads", "Every log is what its owner signed", heads),
    Check("witnesses", "A quorum of silos vouches for the server's log", witnesses),
    Check("one-history", "The server showed every silo the same log", one_history),
    Check("same-code", "All participants ran the same code", same_code),
    Check("sbom", "The software's bill of materials is here", bill_of_materials),
)
