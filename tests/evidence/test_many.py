"""Logs of many silos: the same entries in fewer bytes, and evidence from which nothing is missing.

Runs here have 16 silos, and the number from which logs are written in short is set below that.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
from securefedcollm_audits.verification.merge import merge
from securefedcollm_audits.verification.verify import verify

from benchmarks import cohort
from securefedcollm.aggregation import Step
from securefedcollm.aggregation.header import Roster
from securefedcollm.aggregation.roles import Transcript
from securefedcollm.errors import ConfigError, EvidenceError, RemoteProtocolError, StateError
from securefedcollm.evidence import many as many_room
from securefedcollm.evidence.bundle import make_bundle, pack, read_members
from securefedcollm.evidence.entries import (
    Agreed,
    Entry,
    Opened,
    Opening,
    Summed,
    Unmasked,
    canonical,
    decode_entry,
    encode_entry,
)
from securefedcollm.evidence.fields import Member
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.many import UNNAMED, Many, encode_roster, silo_members, split
from securefedcollm.evidence.merkle import inclusion_proof, inclusion_proofs, verify_inclusion
from securefedcollm.evidence.note import origin, sign_checkpoint
from securefedcollm.federation import files as files_limit
from securefedcollm.federation import messages
from securefedcollm.federation.engines.dropouts import Drop
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.plan import silo_names
from securefedcollm.federation.records.silo import SiloRecord
from securefedcollm.federation.workload import silent
from securefedcollm.primitives import SigningKey, merkle_root
from securefedcollm.privacy.journal import durable_database, rehearsed
from securefedcollm.simulation.cohort import identity_at
from securefedcollm.study import load_study
from tests.support.forge import by_name, doctor

SILOS = 16
NAMES = [f"silo-{i:03d}" for i in range(150)]
ROSTER = Roster({name: hashlib.sha256(name.encode()).digest() for name in NAMES})
SERVER = Member("server", "server", "5" * 64)
AT = {"round": 0, "attempt": 0, "header": "a" * 64}
LISTS = {"survivors": NAMES[1:], "dropouts": NAMES[:1], "lists": "c" * 64, "delivery": "d" * 64}
CONTENT = [
    Opened(
        study="1" * 64,
        run="2" * 32,
        roster=[SERVER, *silo_members(ROSTER)],
        version="1",
        code="3" * 64,
    ),
    Agreed(**AT, **LISTS),
    Unmasked(**AT, lists="c" * 64, seeds_of=NAMES[1:], keys_of=NAMES[:1]),
    Opening(**AT, **LISTS, agreements={name: f"{i:0128x}" for i, name in enumerate(NAMES)}),
    Summed(**AT, survivors=NAMES[1:], sum="e" * 64),
]


def entry_of(what) -> Entry:
    return Entry(0, "2026-01-01T00:00:00Z", "server", what)


@pytest.mark.parametrize("what", CONTENT, ids=lambda what: type(what).__name__)
def test_an_entry_is_the_same_in_fewer_bytes(what) -> None:
    spelling = Many(ROSTER, {})
    raw, whole = encode_entry(entry_of(what), spelling), encode_entry(entry_of(what))
    assert len(raw) < 600 < len(whole) / 3
    again = Many(ROSTER, spelling.kept)
    assert decode_entry(raw, "here", again) == entry_of(what)
    assert encode_entry(decode_entry(raw, "here", again), again) == raw
    with pytest.raises(EvidenceError):
        decode_entry(raw, "here")
    assert type(decode_entry(raw, "here", UNNAMED).what) is type(what)


def test_entries_about_the_same_silos_share_one_list() -> None:
    """Or the memory of an auditor of n logs would grow with n²."""
    raw = encode_entry(entry_of(CONTENT[1]), Many(ROSTER, {}))
    one, two = (decode_entry(raw, "here", Many(ROSTER, {})).what for _ in range(2))
    assert one.survivors is two.survivors
    assert one.dropouts is two.dropouts


def spoilt(kind: int, change) -> bytes:
    plain = json.loads(encode_entry(entry_of(CONTENT[kind]), Many(ROSTER, {})))
    change(plain["what"])
    return canonical(plain)


def put(key, make):
    return lambda what: what.update({key: make(what[key])})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (1, put("survivors", lambda bits: bits[:-2] + "ff")),  # spare bits
        (1, put("survivors", lambda bits: bits.upper())),
        (1, put("survivors", lambda bits: bits + "00")),
        (1, put("survivors", lambda bits: bits[:-2] + " 0")),
        (1, put("survivors", lambda bits: NAMES)),  # a second spelling
        (1, put("survivors", lambda bits: 7)),
        (0, put("roster", lambda roster: roster | {"silos": "0" * 64})),
        (0, put("roster", lambda roster: roster | {"more": []})),
        (0, put("roster", lambda roster: [SERVER.name])),
        (0, put("roster", lambda r: r | {"others": [dict.fromkeys(["name", "key"], "x")]})),
        (3, put("agreements", lambda said: "0" * 64 + said[64:])),  # of other signatures
        (3, put("agreements", lambda said: said[:-4] + "0000")),  # of fewer silos
        (3, put("agreements", lambda said: {})),
    ],
)
def test_what_no_log_writes_is_refused(kind, change) -> None:
    kept = Many(ROSTER, {})
    encode_entry(entry_of(CONTENT[3]), kept)
    with pytest.raises(EvidenceError, match="not an entry"):
        decode_entry(spoilt(kind, change), "here", Many(ROSTER, kept.kept))


def test_a_silo_beside_the_root_is_refused() -> None:
    another = {"name": "silo-x", "role": "silo", "key": "7" * 64}
    raw = spoilt(0, lambda what: what["roster"]["others"].append(another))
    with pytest.raises(EvidenceError, match="beside the roster's root"):
        decode_entry(raw, "here", Many(ROSTER, {}))


OWN = SigningKey(b"\1" * 32)
SEEN_BY = Roster(
    {name: OWN.public if name == NAMES[1] else ROSTER.key(i + 1) for i, name in enumerate(NAMES)}
)


def vouch(directory, change=lambda said: said, *, challenged=True) -> bool:
    """Whether a silo that opened a sum vouches for the server's log of it.

    Args:
        change: what the server logs of the agreements.
        challenged: whether the silo saw them counted, in this process.
    """
    server, study = SigningKey(bytes(32)), bytes(32)
    log = EvidenceLog(directory / "e.sqlite", study=study, owner=NAMES[1], key=OWN, silos=SEEN_BY)
    record = SiloRecord(log, key=OWN, roster=SEEN_BY, server=server.public)
    plain = json.loads(encode_entry(entry_of(CONTENT[3]), Many(SEEN_BY, {})))
    said = plain["what"]["agreements"]
    seen = Transcript(
        header=bytes.fromhex(AT["header"]),
        lists=bytes.fromhex(LISTS["lists"]),
        survivors=tuple(LISTS["survivors"]),
        dropouts=tuple(LISTS["dropouts"]),
        tally=bytes.fromhex(said) if challenged else b"",
    )
    log.append(CONTENT[1])
    values = SimpleNamespace(values=1)
    digests = {"digest": seen.header, "model_digest": bytes(32)}
    header = SimpleNamespace(round=0, attempt=0, on_graph=True, parameters=values, **digests)
    record.round(header, bytes(32), bytes(32), b"", b"")
    record.said(SimpleNamespace(transcript=seen, step=Step.DONE))
    plain["what"]["agreements"] = change(said)
    raw = canonical(plain)
    head = sign_checkpoint(origin(study, "server"), server, 1, merkle_root([raw]))
    (proof,) = inclusion_proofs([raw], [0])
    shown = [messages.Shown(0, raw, proof)]
    try:
        record.countersign(messages.Witness(head.note, 0, [], shown))
    except RemoteProtocolError:
        return False
    finally:
        log.close()
    return True


def test_a_silo_vouches_for_the_agreements_that_it_challenged(tmp_path) -> None:
    assert vouch(tmp_path)


def other_root(said):
    return "f" * 64 + said[64:]


def fewer(said):
    return said[:64] + "fc" + said[66:]


@pytest.mark.parametrize("change", [other_root, fewer])
def test_a_silo_vouches_for_no_other_agreements(tmp_path, change) -> None:
    (tmp_path / "control").mkdir()
    assert vouch(tmp_path / "control", change, challenged=False)  # the attack
    assert not vouch(tmp_path, change)


@pytest.mark.parametrize("root", ["no root".ljust(64, "!"), "F" * 64, " " * 64])
def test_a_silo_vouches_for_no_agreements_without_a_root(tmp_path, monkeypatch, root) -> None:
    (tmp_path / "control").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(many_room, "IS_ROOT", re.compile(".{64}"))
        make = lambda said: root + said[64:]  # noqa: E731
        assert vouch(tmp_path / "control", make, challenged=False)
    assert not vouch(tmp_path, make, challenged=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two rounds of 16 silos: killed after the first, gone on with; one is lost at an upload."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many_room, "MAX_SILOS", 3)
        directory = tmp_path_factory.mktemp("silos") / "run"
        study = cohort.study_of(SILOS, rounds=2, minimum=15)
        drops = [Drop.parse("3@upload:2", silo_names(study), study.scheme)]

        def stop(record):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cohort.run(directory, study, on_round=stop)
        yield cohort.run(directory, study, drops=drops)


@pytest.fixture
def run(finished):
    return finished.parent


@pytest.fixture
def keys(run):
    homes = {"server": run / "server"} | {path.name: path for path in (run / "silos").glob("*")}
    return {name: identity_at(home, name) for name, home in homes.items()}


def test_the_evidence_of_a_run_holds(finished) -> None:
    verdict = verify(finished)
    assert verdict.failed == []
    passed = {result.name for result in verdict.results if result.status == "pass"}
    assert {"agreements", "quorum", "witnesses", "one-kind", "heads", "mechanism"} <= passed
    assert "31 signatures by survivors" in by_name(verdict)["agreements"].evidence


def test_no_entry_grows_with_the_silos(finished) -> None:
    members = read_members(finished)
    lines = [line for name, raw in members.items() if name[:4] == "logs" for line in raw.split()]
    assert max(map(len, lines)) < 1200
    assert sum(b"silo-07" in line for line in members["logs/server.jsonl"].split()) == 0
    assert len([name for name in members if name.startswith("signatures/")]) == 2


def test_the_parts_make_the_whole_again(finished, run, tmp_path) -> None:
    parts = []
    for name in ("server", *sorted(path.name for path in (run / "silos").glob("*"))):
        parts.append(tmp_path / f"{name}.zip")
        parts[-1].write_bytes(make_bundle(run, [name]))
    alone = verify(parts[1])
    assert alone.failed == []
    assert not any(name.startswith("signatures/") for name in read_members(parts[1]))
    assert merge(parts) == finished.read_bytes()


def test_a_silo_proves_that_it_agreed(finished) -> None:
    """With its signature and the path to the root that the server's log names."""
    members = read_members(finished)
    log = [json.loads(line)["what"] for line in members["logs/server.jsonl"].splitlines()]
    said = next(what["agreements"] for what in log if what["kind"] == "opening")
    signatures = split(members[f"signatures/{said[:64]}"])
    proof = inclusion_proof(signatures, 4)
    verify_inclusion(signatures[4], 4, len(signatures), proof, bytes.fromhex(said[:64]))
    with pytest.raises(EvidenceError):
        verify_inclusion(bytes(64), 4, len(signatures), proof, bytes.fromhex(said[:64]))


def of_opening(f):
    what = f.what("server", "opening")
    return what, f"signatures/{what['agreements'][:64]}"


def exchanged(f):
    """One signature is another silo's; the root is as signed."""
    _, name = of_opening(f)
    f.members[name] = f.members[name][64:128] + f.members[name][64:]


def left_out(f):
    del f.members[of_opening(f)[1]]


def beside(f):
    f.members["signatures/" + "0" * 64] = bytes(64)


def emptied(f):
    """Of no signatures, beside a log that names none of them."""
    f.members["signatures/" + "0" * 64] = b""


def made_up(f):
    """The server, which holds its log's key, names a signature that nobody made."""
    what, name = of_opening(f)
    signatures = [bytes(64), *split(f.members.pop(name))[1:]]
    root = merkle_root(signatures).hex()
    f.members[f"signatures/{root}"] = b"".join(signatures)
    what["agreements"] = root + what["agreements"][64:]


def without_one(f):
    """The server leaves a silo out of the list that all have signed."""
    what = f.what("server", "opening")
    what["survivors"] = "fe" + what["survivors"][2:]


def other_roster(f):
    pairs = json.loads(f.members["roster.json"])
    pairs[0][1] = SigningKey(bytes(32)).public.hex()
    f.members["roster.json"] = canonical(pairs)


@pytest.mark.parametrize(
    ("edit", "check", "fault"),
    [
        (exchanged, "archive", "are missing or others"),
        (left_out, "archive", "are missing or others"),
        (emptied, "archive", f"signatures/{'0' * 64} is empty"),
        (beside, "archive", "no log names signatures/000"),
        (made_up, "agreements", "the agreement of silo-01 does not verify"),
        (without_one, "agreements", "not the digest of these lists"),
        (other_roster, "archive", "names other silos or keys"),
    ],
)
def test_forged_evidence_is_found(finished, keys, tmp_path, edit, check, fault) -> None:
    verdict = verify(doctor(finished, tmp_path / "forged.zip", edit, keys))
    assert fault in str(by_name(verdict)[check].faults)


@pytest.mark.parametrize("raw", [b"", b"{}", b'[["a","00"]]', b'[["a"]]', b"[[1,2]]"])
def test_a_bundle_without_a_sound_roster_is_refused(finished, tmp_path, raw) -> None:
    members = {k: v for k, v in read_members(finished).items() if k != "manifest.json"}
    path = tmp_path / "forged.zip"
    path.write_bytes(pack(members | {"roster.json": raw}))
    (fault,) = verify(path).results[0].faults
    assert "roster.json" in fault


def test_a_bundle_without_a_roster_says_what_is_missing(finished, tmp_path) -> None:
    members = {k: v for k, v in read_members(finished).items() if k != "manifest.json"}
    path = tmp_path / "forged.zip"
    path.write_bytes(pack({k: v for k, v in members.items() if k != "roster.json"}))
    (fault,) = verify(path).results[0].faults
    assert "roster.json: missing" in fault


def test_a_roster_in_another_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order of names"):
        many_room.decode_roster(canonical(json.loads(encode_roster(ROSTER))[::-1]))


def test_a_run_whose_list_of_silos_is_gone_says_so(finished, run, tmp_path) -> None:
    assert many_room.silos_of(load_study(run / "study.yaml"), run) is not None
    with pytest.raises(StateError, match=r"roster\.json: .*it is missing"):
        many_room.silos_of(load_study(run / "study.yaml"), tmp_path)


def test_a_run_goes_on_with_the_silos_that_it_began_with(finished, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.parent, run)
    list_, identity = run / "server/roster.json", run / "silos/silo-03/identity.json"
    kept = {path: path.read_bytes() for path in (list_, identity)}
    bundle = make_bundle(run)

    def resume():
        return cohort.run(run, cohort.study_of(SILOS, rounds=2, minimum=15))

    identity.unlink()  # it gets another
    with pytest.raises(ConfigError, match=r"roster\.json: silo-03 has another identity"):
        resume()
    assert list_.read_bytes() == kept[list_]
    assert make_bundle(run) == bundle
    identity.write_bytes(kept[identity])
    resume()
    list_.write_bytes(b"{}")
    with pytest.raises(StateError, match=r"roster\.json: the list of the run's silos"):
        resume()
    assert list_.read_bytes() == b"{}"


def test_only_simulations_of_many_silos_leave_the_disk_its_time(tmp_path) -> None:
    def level(name):
        database = durable_database(tmp_path / name, "")
        return database.execute("PRAGMA synchronous").fetchone()[0]

    with rehearsed():
        assert level("a") == 1
    assert level("b") == 2


def test_too_few_open_files_are_said_before_a_silo_begins(monkeypatch) -> None:
    monkeypatch.setattr(files_limit.resource, "getrlimit", lambda kind: (256, 4096))
    with pytest.raises(StateError, match="12512 open files, and this system allows 4096"):
        files_limit.allow_open_files(12_000)
    set_to = []
    monkeypatch.setattr(
        files_limit.resource, "setrlimit", lambda kind, limits: set_to.append(limits)
    )
    files_limit.allow_open_files(1000)
    files_limit.allow_open_files(0)  # 512 are above the soft limit too
    assert set_to == [(1512, 4096), (512, 4096)]


@pytest.mark.parametrize("error", [None, ValueError("not allowed"), OSError("no permission")])
def test_few_silos_are_never_refused_for_their_open_files(monkeypatch, error) -> None:
    set_to = []

    def set_limit(kind, limits):
        if error is not None:
            raise error
        set_to.append(limits)

    monkeypatch.setattr(files_limit.resource, "getrlimit", lambda kind: (256, 1024))
    monkeypatch.setattr(files_limit.resource, "setrlimit", set_limit)
    made = []
    engine = partial(
        EmbeddedEngine,
        factory=lambda name, progress: made.append(name),
        workers=0,
        progress=silent,
    )
    engine(NAMES[:128])
    assert len(made) == 128
    assert set_to == ([] if error else [(1024, 1024)])
    if error is not None:
        with pytest.raises(StateError, match="allows 256"):
            files_limit.allow_open_files(200)
    with pytest.raises(StateError, match="2072 open files"):
        engine(NAMES[:130])
    assert len(made) == 128


def limited(name, progress):
    return None


def test_a_process_with_too_many_silos_says_what_it_lacks(monkeypatch) -> None:
    """No traceback of a process, and no advice to have fewer of them."""
    monkeypatch.setattr(files_limit.resource, "getrlimit", lambda kind: (256, 1024))
    with pytest.raises(StateError, match="this system allows 1024"):
        EmbeddedEngine(
            [*NAMES, *(f"{name}-b" for name in NAMES)],
            limited,
            workers=2,
            progress=silent,
            context=multiprocessing.get_context("fork"),
        )


@pytest.mark.soak
def test_a_hundred_and_fifty_silos_in_two_processes(tmp_path) -> None:
    """Without a number set below: more silos than a study without a graph can have."""
    path = cohort.run(tmp_path / "run", cohort.study_of(150), workers=2)
    assert verify(path).failed == []
    members = read_members(path)
    assert len(members["logs/silo-150.jsonl"]) < 6000
    assert max(map(len, members["logs/silo-150.jsonl"].split())) < 1200
