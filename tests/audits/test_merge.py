"""Several participants' bundles joined into one. Adversary: whoever made one of them."""

from __future__ import annotations

import json

import pytest
from securefedcollm_audits.verification.merge import MOST_BUNDLES, merge
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.evidence.bundle import make_bundle, pack, read_members
from securefedcollm.evidence.entries import canonical
from securefedcollm.evidence.note import parse_checkpoint
from tests.support.forge import Forger, by_name, doctor


def part(bundle, path, *names):
    """What these participants of the run give away."""
    path.write_bytes(make_bundle(bundle.parent, names))
    return path


def parts_of(bundle, directory):
    """One bundle a participant, each of its own log alone."""
    names = [name[5:-6] for name in read_members(bundle) if name.startswith("logs/")]
    return [part(bundle, directory / f"{name}.zip", name) for name in names]


def merged(paths, directory):
    path = directory / "merged.zip"
    path.write_bytes(merge(paths))
    return path


@pytest.mark.parametrize("kind", ["record", "authority", "ckks", "joint"])
def test_the_parts_of_a_run_are_its_bundle_again(kind, request, tmp_path):
    """To the byte, in any order: the same checks, the same signatures, the same verdict."""
    whole = request.getfixturevalue(f"{kind}_bundle")
    paths = parts_of(whole, tmp_path)
    assert merge(paths) == whole.read_bytes()
    assert merge([*paths[::-1], whole]) == whole.read_bytes()


def test_alone_they_are_silent_on_what_joined_they_show(record_bundle, tmp_path):
    paths = parts_of(record_bundle, tmp_path)
    alone = by_name(verify(paths[-1]))
    together = verify(merged(paths, tmp_path))
    for name in ("witnesses", "transcripts", "attempts"):
        assert alone[name].status == "not covered"
        assert by_name(together)[name].status == "pass"
    assert together.holds


def test_a_participant_who_signed_two_logs_is_named(record_bundle, tmp_path):
    """Equivocation. The control: an older copy of the same log is no contradiction."""
    paths = parts_of(record_bundle, tmp_path)

    def other(f):
        f.what("silo-2", "opened")["version"] = "9.9"

    lie = doctor(part(record_bundle, tmp_path / "own.zip", "silo-2"), tmp_path / "lie.zip", other)
    assert verify(lie).holds  # by itself nothing is wrong with it
    with pytest.raises(EvidenceError) as caught:
        merge([*paths, lie])
    text = str(caught.value)
    assert "silo-2 signed two different logs of this run (silo-2#0 (opened) in the one" in text
    assert "equivocation" in text
    assert "evidence that silo-2 lied" in text
    assert "keep both bundles" in str(caught.value.hint)
    assert text.isprintable()

    early = older(record_bundle, tmp_path / "early.zip", "silo-2", 5)
    assert verify(early).holds
    found = merged([*paths, early], tmp_path)
    assert verify(found).holds
    assert read_members(found)["logs/silo-2.jsonl"].count(b"\n") > 5


def older(bundle, path, who, count):
    """The bundle of one participant as it was after so many entries."""
    forger = Forger(part(bundle, path, who))
    forger.logs[who] = forger.logs[who][:count]
    forger.heads[who] = []
    forger.seal(cascade=False)
    return forger.write(path)


def test_a_log_that_its_owner_did_not_sign_accuses_nobody(record_bundle, tmp_path):
    """Adversary: whoever writes another log in silo-2's name, and has not its key."""
    paths = parts_of(record_bundle, tmp_path)
    members = read_members(tmp_path / "silo-2.zip")
    del members["manifest.json"]
    members["logs/silo-2.jsonl"] = members["logs/silo-2.jsonl"].replace(b'"0.1.0"', b'"0.9.9"')
    forged = tmp_path / "forged.zip"
    forged.write_bytes(pack(members))
    with pytest.raises(EvidenceError, match=r"forged.zip: cannot be joined, heads: ") as caught:
        merge([*paths, forged])
    assert "lied" not in str(caught.value)


def test_a_server_that_told_silos_different_things_shows_in_the_joined_bundle(
    record_bundle, tmp_path
):
    """Nobody signed two logs here: the silos' own entries contradict each other."""

    def shown_another(f):
        f.what("silo-2", "witnessed")["root"] = "0" * 64

    one = part(record_bundle, tmp_path / "one.zip", "silo-1")
    two = part(record_bundle, tmp_path / "two.zip", "silo-2")
    lie = doctor(two, tmp_path / "lie.zip", shown_another)
    assert verify(merged([one, two], tmp_path)).holds
    verdict = verify(merged([one, lie], tmp_path))
    assert [result.name for result in verdict.failed] == ["one-history"]


def test_cosignatures_of_two_copies_are_joined(record_bundle, tmp_path):
    """The server's log, each copy with the cosignatures of half the silos: of a quorum together."""
    halves = []
    for index, kept in enumerate((("silo-1", "silo-2"), ("silo-2", "silo-3", "silo-4"))):
        forger = Forger(part(record_bundle, tmp_path / f"half{index}.zip", "server"))
        forger.heads["server"] = [
            (entry, [name for name in names if name in kept])
            for entry, names in forger.heads["server"]
        ]
        forger.seal()
        halves.append(forger.write(tmp_path / f"half{index}.zip"))
    assert by_name(verify(halves[0]))["witnesses"].status == "fail"
    found = merged(halves, tmp_path)
    assert merge(halves[::-1]) == found.read_bytes()
    assert by_name(verify(found))["witnesses"].status == "pass"
    last = parse_checkpoint(json.loads(read_members(found)["heads/server.json"])[-1])
    assert len(last.lines) == 5


def test_other_studies_and_runs_are_refused(record_bundle, silo_bundle, tmp_path):
    with pytest.raises(ConfigError, match="are not of one study"):
        merge([record_bundle, silo_bundle])

    def another_run(f):
        f.what("silo-2", "opened")["run"] = "0" * 32

    own = part(record_bundle, tmp_path / "own.zip", "silo-2")
    with pytest.raises(ConfigError, match="are of two runs of the study"):
        merge([record_bundle, doctor(own, tmp_path / "other.zip", another_run)])

    def another_key(f):
        f.what("silo-2", "opened")["roster"][1]["key"] = "1" * 64

    with pytest.raises(EvidenceError, match="other keys of theirs"):
        merge([record_bundle, doctor(own, tmp_path / "keys.zip", another_key)])


def test_another_list_of_adapters_under_the_same_log_is_refused(record_bundle, tmp_path):
    members = read_members(part(record_bundle, tmp_path / "server.zip", "server"))
    del members["manifest.json"]
    members["artefacts.json"] = canonical({"slm/theta.npy": "0" * 64})
    (tmp_path / "swapped.zip").write_bytes(pack(members))
    with pytest.raises(EvidenceError, match=r"swapped.zip: its artefacts.json is not that of"):
        merge([tmp_path / "server.zip", tmp_path / "swapped.zip"])


def test_broken_files_too_many_and_too_large(record_bundle, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="1 bundles were named"):
        merge([record_bundle])
    with pytest.raises(ConfigError, match=f"{MOST_BUNDLES + 1} bundles were named"):
        merge([record_bundle] * (MOST_BUNDLES + 1))
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(EvidenceError, match=r"broken.zip: not a bundle"):
        merge([record_bundle, tmp_path / "broken.zip"])
    with pytest.raises(ConfigError, match="there is no such file"):
        merge([record_bundle, tmp_path / "nowhere.zip"])
    size = record_bundle.stat().st_size
    monkeypatch.setattr("securefedcollm_audits.verification.merge.MAX_BYTES", 2 * size)
    assert merge([record_bundle, record_bundle]) == record_bundle.read_bytes()
    with pytest.raises(EvidenceError, match="with this one the bundles are over"):
        merge([record_bundle] * 3)
