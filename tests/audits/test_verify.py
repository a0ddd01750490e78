"""``audit verify``: honest bundles pass; for every check, a forgery that it and only it catches.

Adversary: whoever made the bundle, with every participant's key (see :mod:`.forge`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securefedcollm_audits.verification.expected import expectation
from securefedcollm_audits.verification.merge import merge
from securefedcollm_audits.verification.verify import CHECKS, verify

from securefedcollm.aggregation.messages import lists_digest
from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.evidence.bundle import make_bundle, pack, read_members
from securefedcollm.evidence.entries import canonical
from securefedcollm.primitives import sha256
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study.signing import read_envelope, sign_study, signatures_path
from tests.support.forge import by_name, doctor, header_of
from tests.support.runs import ALL_KEYS, NAMES, RecordedRun, recorded_study

OTHER = "0" * 64
VECTORS = Path(__file__).parents[1] / "vectors" / "v1"


def test_honest_bundles_pass_every_check(record_bundle, silo_bundle, joint_bundle, adaptive_bundle):
    for bundle in (record_bundle, silo_bundle, joint_bundle, adaptive_bundle):
        verdict = verify(bundle)
        assert verdict.holds
        silent = [r.name for r in verdict.results if r.status != "pass"]
        assert silent == [
            *("expected", "study-signed", "ciphertexts", "authority", "released-sum", "audits")
        ]
        assert verdict.passed == len(CHECKS) - 4  # all but these, and the archive
        assert (verdict.rounds_done, verdict.rounds) == (2, 2)
        assert verdict.participants == ["server", *NAMES]


@pytest.mark.parametrize("kind", ["joint", "ckks"])
def test_bundles_of_earlier_code_still_verify(kind):
    """Made with the code of 22 November 2026, before countersignatures told of openings."""
    verdict = verify(VECTORS / f"bundle-{kind}.zip")
    assert verdict.holds
    silent = {r.name for r in verdict.results if r.status != "pass"}
    silent ^= {"ciphertexts"} if kind == "joint" else set()
    assert silent == {"expected", "study-signed", "authority", "released-sum", "audits"}


def unmasked(bundle, name):
    """(attempt, survivors) of what a silo's log says that it unmasked in round 1."""
    lines = read_members(bundle)[f"logs/{name}.jsonl"].splitlines()
    said = [json.loads(line)["what"] for line in lines]
    return [
        (what["attempt"], what["seeds_of"])
        for what in said
        if what["kind"] == "unmasked" and what["round"] == 0
    ]


def answered_for_two_sets(f):
    """silo-1 answers the first attempt as well; what is sent for it is in no other log."""
    answer = json.loads(json.dumps(f.find("silo-4", "unmasked")))
    answer["owner"] = "silo-1"
    agreed = f.find("silo-1", "agreed")
    f.logs["silo-1"].insert(f.logs["silo-1"].index(agreed) + 1, answer)


def test_an_answer_to_an_attempt_that_failed_opens_nothing_but_two_answers_may(
    alone_bundle, tmp_path
):
    """No false alarm for honest participants; a silo that answers for two sets is found."""
    assert unmasked(alone_bundle, "silo-4") == [(0, list(NAMES))]
    assert unmasked(alone_bundle, "silo-1") == [(1, list(NAMES[:3]))]
    assert verify(alone_bundle).failed == []
    forged = doctor(alone_bundle, tmp_path / "forged.zip", answered_for_two_sets)
    (failed,) = verify(forged).failed
    assert failed.name == "one-sum"
    assert re.search(r"silo-1#\d+ \(unmasked\): round 1 was opened for others", failed.faults[0])


def test_audits_that_refute_nothing_pass(audited_bundle):
    verdict = verify(audited_bundle)
    assert verdict.holds
    assert by_name(verdict)["audits"].evidence == (
        "2 audits (inversion, mechanism): nothing was refuted; 1 at other settings of the same code"
    )


# --- One forgery a check --------------------------------------------------------------------------


def change(who, kind, **fields):
    """An edit that sets fields of the first entry of a kind."""
    return lambda f: f.what(who, kind).update(fields)


def stranger_in_roster(f):
    for log in f.logs.values():
        del log[0]["what"]["roster"][-1]


def other_run(f):
    f.what("silo-2", "opened")["run"] = "0" * 32


def unsigned_tail(f):
    f.seal()
    f.heads["silo-1"] = []
    f.members["heads/silo-1.json"] = canonical([])
    return "sealed"


def rewritten_under_the_head(f):
    heads = f.members["heads/silo-3.json"]
    f.what("silo-3", "opened")["version"] = "6.6.6"
    f.seal()
    f.members["heads/silo-3.json"] = heads
    return "sealed"


def cosigned_by_a_stranger(f):
    f.heads["server"][-1][1].append("silo-1")  # twice


def few_witnesses(f):
    for _, signers in f.heads["server"]:
        del signers[2:]


def another_log_for_one_silo(f):
    f.seal()
    f.what("silo-2", "witnessed", -1)["root"] = OTHER
    f.seal(cascade=False)
    return "sealed"


def cosignature_without_a_trace(f):
    f.remove("silo-1", "witnessed", -1)


def other_sbom(f):
    document = json.loads(f.members["sbom.json"])
    del document["components"][3]
    f.members["sbom.json"] = canonical(document)


def other_base_on_one_side(f):
    for entry in f.logs["silo-2"]:
        if entry["what"]["kind"] == "round":
            entry["what"]["base"] = OTHER


def shares_of_both_kinds(f):
    """Two silos unmask different lists of one attempt; the agreements are cut to fit."""
    mine = f.what("silo-2", "unmasked")
    mine["keys_of"] = [mine["seeds_of"][-1]]


def hidden_opening(f):
    for kind in ("opening", "summed"):
        f.remove("server", kind, -1)


def bad_agreement(f):
    agreements = f.what("server", "opening")["agreements"]
    agreements["silo-2"] = agreements["silo-1"]


def few_agreements(f):
    agreements = f.what("server", "opening")["agreements"]
    for name in ("silo-1", "silo-2"):
        del agreements[name]


def sum_of_two(f):
    for who, kind in (("server", "opening"), *((n, "agreed") for n in NAMES)):
        f.what(who, kind).update(survivors=["silo-1", "silo-2"], dropouts=[])


def uncharged_upload(f):
    for kind in ("settled", "released"):
        f.remove("silo-1", kind)


def given_back(f):
    entry = f.find("silo-1", "settled")
    entry["what"] = {k: v for k, v in entry["what"].items() if k not in {"events", "spent"}}
    entry["what"]["kind"] = "voided"


def louder_than_reserved(f):
    f.what("silo-1", "settled")["events"][0]["noise_multiplier"] = 0.9


def fewer_steps(f):
    for kind in ("reserved", "settled"):
        f.what("silo-1", kind)["events"][0]["steps"] = 4


def over_the_limit(f):
    for nth in (0, 1):
        f.what("silo-1", "reserved", nth)["epsilon"] = 2.0


def understated(f):
    f.what("silo-1", "settled", -1)["spent"]["epsilon"] = 1.0


RECORD_FORGERIES = [
    ("membership", stranger_in_roster, r"server#0 \(opened\): 3 silos"),
    ("membership", other_run, r"silo-2#0 \(opened\): is of run 00000000"),
    ("heads", unsigned_tail, r"heads/silo-1.json: 17 entries, of which 0 are signed"),
    ("heads", rewritten_under_the_head, r"heads/silo-3.json: the log is not what was signed"),
    ("heads", cosigned_by_a_stranger, r"heads/server.json: the cosignature of silo-1 at 9"),
    ("witnesses", few_witnesses, r"server#4 \(finished\): no 3 of 4 silos vouch"),
    ("one-history", another_log_for_one_silo, r"silo-2#16 \(witnessed\): was shown another"),
    ("one-history", cosignature_without_a_trace, r"heads/server.json: silo-1 cosigned 9"),
    ("same-code", change("silo-3", "opened", code=OTHER), r"silo-3#0 \(opened\)"),
    ("sbom", other_sbom, r"sbom.json: is not the one"),
    ("sbom", lambda f: f.members.pop("sbom.json"), r"sbom.json: missing"),
    ("step-order", lambda f: f.remove("server", "opening"), r"server#2 \(summed\): a sum of other"),
    ("step-order", lambda f: f.remove("silo-1", "agreed"), r"silo-1#6 \(unmasked\): out of order"),
    ("headers", change("server", "round", model=OTHER), r"server#1 \(round\)"),
    ("headers", change("silo-1", "round", values=7), r"silo-1#1 \(round\)"),
    ("models", other_base_on_one_side, r"silo-2#1 \(round\): another base model"),
    ("models", change("server", "finished", adapter=OTHER), r"server#5 \(round\)"),
    (
        "artefacts",
        lambda f: f.members.update({"artefacts.json": canonical({"slm/theta.npy": OTHER})}),
        r"artefacts.json: slm/theta.npy is not what server#8 \(finished\) made",
    ),
    ("quorum", few_agreements, r"server#2 \(opening\): 2 agreements; 3 are needed"),
    ("quorum", sum_of_two, r"server#2 \(opening\): a sum of 2 silos; 3 are needed"),
    ("agreements", bad_agreement, r"server#2 \(opening\): the agreement of silo-2"),
    ("agreements", change("silo-4", "agreed", lists=OTHER), r"silo-4#6 \(agreed\)"),
    ("one-kind", shares_of_both_kinds, r"silo-2#7 \(unmasked\): silo-4: both kinds of share, see"),
    (
        "one-sum",
        change("silo-1", "unmasked", seeds_of=["silo-1", "silo-2", "silo-3"]),
        r"silo-1#7 \(unmasked\): round 1 was opened for others too, see server#3 \(summed\)",
    ),
    ("transcripts", change("silo-2", "round", header=OTHER), r"silo-2#1 \(round\)"),
    ("transcripts", hidden_opening, r"silo-1#15 \(unmasked\): the server's log hides"),
    ("charged-first", uncharged_upload, r"silo-1#3 \(uploaded\): left before it was charged"),
    ("ledger-order", given_back, r"silo-1#4 \(voided\): follows released"),
    ("settled", louder_than_reserved, r"silo-1#4 \(settled\): settles more than was reserved"),
    ("mechanism", fewer_steps, r"silo-1#2 \(reserved\): charges 4 steps; the study has 5"),
    ("budget", over_the_limit, r"silo-1#12 \(settled\): ε = 2.8\d+ spent of 2"),
    ("second-accountant", understated, r"silo-1#12 \(settled\): claims ε = 1.0000"),
]


def fewer_colluders(f):
    for kind in ("reserved", "settled"):
        f.what("silo-1", kind)["events"][0]["colluders"] = 0


def a_share_too_many(f):
    f.what("silo-1", "settled", -1)["events"][0]["shares"] = 4


def more_noise_than_there_was(f):
    for kind in ("reserved", "settled"):
        f.what("silo-1", kind)["events"][0]["share_sigma"] *= 2.0


SILO_FORGERIES = [
    ("mechanism", more_noise_than_there_was, r"silo-1#2 \(reserved\): charges for other noise"),
    ("mechanism", fewer_colluders, r"silo-1#2 \(reserved\): allows for 0 colluders, not 1"),
    ("mechanism", a_share_too_many, r"silo-1#\d+ \(settled\): counts 4 noise shares"),
    ("second-accountant", understated, r"silo-1#\d+ \(settled\): claims ε = 1.0000; it is ≥"),
    ("headers", change("server", "round", mechanism=None), r"server#1 \(round\)"),
    (
        "headers",
        change("silo-2", "round", mechanism=OTHER),
        r"silo-2#1 \(round\): the model's digest is not that of its parts",
    ),
]


def found_more_than_it_says(f):
    f.what("silo-2", "audited").update(bound=2.5)


def held_against_a_claim_that_the_study_does_not_make(f):
    f.what("silo-2", "audited").update(bound=9.0, claimed=11.0)


AUDITED_FORGERIES = [
    ("audits", change("silo-2", "audited", held=False), r"silo-2#17 \(audited\): mechanism refut"),
    ("audits", found_more_than_it_says, r"silo-2#17 \(audited\): ε is at least 2.50, above the"),
    ("audits", change("server", "audited", code=OTHER), r"server#9 \(audited\): attacked other"),
    ("audits", held_against_a_claim_that_the_study_does_not_make, r"a claim of ε = 11.00"),
]


ADAPTIVE_FORGERIES = [
    ("mechanism", more_noise_than_there_was, r"silo-1#2 \(reserved\): charges for other noise"),
    ("mechanism", change("silo-1", "round", clip=None), r"silo-1#2 \(reserved\): its round has a"),
    (
        "mechanism",
        change("silo-1", "round", clip=[19.0, 19.0 / math.sqrt(99.0)]),
        r"silo-1#2 \(reserved\): its round has a clip norm that the study cannot lead to",
    ),
]


JOINT_FORGERIES = [
    ("mechanism", more_noise_than_there_was, r"silo-1#2 \(reserved\): charges for other noise"),
    ("settled", change("silo-1", "settled", events=[]), r"silo-1#\d+ \(settled\): settles more"),
    ("second-accountant", understated, r"silo-1#\d+ \(settled\): claims ε = 1.0000; it is ≥"),
    (
        "step-order",
        lambda f: f.remove("server", "summed"),
        r"server#3 \(round\): round 1, step 2 out",
    ),
    (
        "step-order",
        lambda f: f.remove("server", "finished"),
        r"server#7 \(round\): round 2, step 1",
    ),
]


def of_ciphertexts(who, kind, **fields):
    """An edit of what a log says about the ciphertexts that were opened."""
    return lambda f: f.what(who, kind)["ciphertexts"].update(fields)


def borrowed_commitment(f):
    roots = f.what("server", "opening")["ciphertexts"]["roots"]
    roots["silo-2"]["signature"] = roots["silo-1"]["signature"]


def swapped_ciphertext(f):
    f.what("server", "opening")["ciphertexts"]["roots"]["silo-1"]["root"] = OTHER


def forgotten_ciphertext(f):
    del f.what("server", "opening")["ciphertexts"]["roots"]["silo-1"]


def borrowed_agreement(kind):
    def edit(f):
        agreements = f.what("server", kind)["agreements"]
        agreements["silo-1"] = agreements["silo-2"]

    return edit


def silent_member(f):
    del f.what("server", "opening")["agreements"]["silo-1"]


def member_as_a_dropout(f):
    """Adversary: a server that counts fewer silos, and fewer noise shares, than are in the sum.
    Round 2 has all four in it; what it writes is consistent, and signed by the other three."""
    opening = f.what("server", "opening", -1)
    del opening["agreements"]["silo-4"]
    opening.update(survivors=["silo-1", "silo-2", "silo-3"], dropouts=["silo-4"])
    lists = lists_digest(bytes.fromhex(opening["delivery"]), [1, 2, 3], [4])
    opening["lists"] = lists.hex()
    f.what("server", "summed", -1)["survivors"] = opening["survivors"]


CKKS_FORGERIES = [
    ("ciphertexts", member_as_a_dropout, r"server#\d+ \(opening\): a member that has a share of"),
    ("ciphertexts", borrowed_commitment, r"server#\d+ \(opening\): the commitment of silo-2"),
    ("ciphertexts", swapped_ciphertext, r"server#\d+ \(opening\): what was signed is not the d"),
    ("ciphertexts", forgotten_ciphertext, r"server#\d+ \(opening\): the ciphertexts are not"),
    ("ciphertexts", borrowed_agreement("opening"), r"server#\d+ .*: the verdict of silo-1 does"),
    ("ciphertexts", of_ciphertexts("server", "opening", key=OTHER), r"the commitment of silo-1 d"),
    ("ciphertexts", change("server", "opening", ciphertexts=None), r"does not say which cipherte"),
    ("quorum", silent_member, r"server#\d+ \(opening\): a silo is in the sum that did not agree"),
    ("step-order", lambda f: f.remove("silo-1", "agreed", -1), r"silo-1#\d+ \(unmasked\): out of"),
]


def other_offer(f):
    f.what("server", "opening")["ciphertexts"]["offer"]["part"] = OTHER


def stolen_offer(f):
    """The server's own key, signed by the server, in the place of the authority's."""
    from securefedcollm.aggregation.ckks.authority.messages import KeyStatement, key_statement

    what = f.what("server", "opening")
    said = key_statement(bytes.fromhex(what["header"]), bytes.fromhex(OTHER))
    raw = ALL_KEYS["server"].sign(KeyStatement.CONTEXT, said)
    what["ciphertexts"]["offer"] = {"part": OTHER, "signature": raw.hex()}


def other_word(who, kind):
    return lambda f: f.what(who, kind)["word"].update(share=OTHER)


def unknown_to_the_authority(f):
    f.remove("authority", "decrypted")


def opened_twice(f):
    again = json.loads(json.dumps(f.find("authority", "decrypted")))
    log = f.logs["authority"]
    log.insert(log.index(f.find("authority", "decrypted")), again)


def no_authority(f):
    for log in f.logs.values():
        del log[0]["what"]["roster"][1]


def for_others(f):
    f.what("authority", "decrypted")["survivors"] = ["silo-1", "silo-2", "silo-3"]


AUTHORITY_FORGERIES = [
    ("ciphertexts", borrowed_commitment, r"server#\d+ \(opening\): the commitment of silo-2"),
    ("ciphertexts", borrowed_agreement("opening"), r"server#\d+ .*: the consent of silo-1 does"),
    ("ciphertexts", of_ciphertexts("authority", "decrypted", key=OTHER), r"another key than the a"),
    ("ciphertexts", of_ciphertexts("server", "opening", offer=None), r"does not say whose key"),
    ("ciphertexts", other_offer, r"the key of the authority does not verify"),
    ("ciphertexts", stolen_offer, r"under another key than the authority's"),
    (
        "authority",
        other_word("server", "summed"),
        r"server#\d+ .*: the authority's word on",
    ),
    ("authority", other_word("silo-2", "told"), r"silo-2#\d+ \(told\): the authority's word on"),
    ("authority", other_word("silo-2", "told"), r"silo-2#\d+ \(told\): another word of the"),
    ("authority", change("server", "summed", word=None), r"does not hold the authority's word"),
    ("authority", unknown_to_the_authority, r"server#\d+ \(summed\): a sum that the authority's"),
    ("step-order", opened_twice, r"authority#3 \(decrypted\): decrypts twice under one key"),
    ("step-order", lambda f: f.remove("authority", "keyed"), r"authority#1 \(decrypted\): decrypt"),
    ("step-order", lambda f: f.remove("silo-1", "uploaded"), r"silo-1#\d+ \(told\): out of order"),
    ("headers", change("authority", "keyed", values=7), r"authority#1 \(keyed\): the header is"),
    ("one-sum", for_others, r"server#3 .*: round 1 was opened for others too, see auth"),
    ("quorum", silent_member, r"server#\d+ \(opening\): a silo is in the sum that did not agree"),
    ("transcripts", lambda f: f.remove("server", "opening"), r"authority#2 .*: the server's log h"),
    ("transcripts", change("authority", "keyed", header=OTHER), r"authority#1 \(keyed\): another"),
    ("membership", no_authority, r"authority#0 .*: the study has, beside its silos, one"),
    ("mechanism", a_share_too_many, r"silo-1#\d+ \(settled\): counts 4 noise shares"),
]


@pytest.mark.parametrize("name", ["ckks", "authority"])
def test_honest_bundles_of_both_key_models_pass(request, name):
    verdict = verify(request.getfixturevalue(f"{name}_bundle"))
    assert verdict.holds
    silent = {r.name for r in verdict.results if r.status != "pass"}
    other = {"ckks": "authority", "authority": "one-kind"}[name]
    assert silent == {"expected", "study-signed", "released-sum", "audits", other}
    found = by_name(verdict)["ciphertexts"].evidence
    # 3 silos in each of two openings, or 4 and 4 sealed of whom 4 and 3 consent; two logs each.
    sealed = {"ckks": "2 openings: 14 signatures", "authority": "4 openings: 34 signatures"}
    assert found.startswith(sealed[name])


@pytest.mark.parametrize(
    ("base", "check", "edit", "place"),
    [("record", *forgery) for forgery in RECORD_FORGERIES]
    + [("silo", *forgery) for forgery in SILO_FORGERIES]
    + [("joint", *forgery) for forgery in JOINT_FORGERIES]
    + [("ckks", *forgery) for forgery in CKKS_FORGERIES]
    + [("authority", *forgery) for forgery in AUTHORITY_FORGERIES]
    + [("audited", *forgery) for forgery in AUDITED_FORGERIES]
    + [("adaptive", *forgery) for forgery in ADAPTIVE_FORGERIES],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_forgery_fails_its_check_and_the_wrong_entry_is_named(
    request, tmp_path, base, check, edit, place
):
    forged = doctor(request.getfixturevalue(f"{base}_bundle"), tmp_path / "forged.zip", edit)
    verdict = verify(forged)
    assert not verdict.holds
    result = by_name(verdict)[check]
    assert result.status == "fail"
    assert any(re.search(place, fault) for fault in result.faults), result.faults


def test_every_check_has_a_forgery():
    covered = {name for name, *_ in RECORD_FORGERIES + SILO_FORGERIES + CKKS_FORGERIES}
    covered |= {name for name, *_ in AUTHORITY_FORGERIES}
    covered |= {name for name, *_ in AUDITED_FORGERIES}
    covered |= {name for _, name, *_ in SERVER_FORGERIES}
    # The first see below; no bundle can show the second, and it says so.
    assert covered == {check.name for check in CHECKS} - {"study-signed", "released-sum"}


# --- What the server alone could make up ----------------------------------------------------------


def attempt_left_out(f):
    """silo-4's answer goes too: else it would be an opening that is hidden."""
    for kind in ("round", "opening", "failed"):
        f.remove("server", kind)
    f.remove("silo-4", "unmasked")


def attempt_after_the_end(f):
    """silo-1 was asked once more for the last sum, when all had vouched for the server's log."""
    begun = f.find("silo-1", "round", -1)
    again = begun["what"] | {"attempt": 1, "header": header_of(f, begun["what"], 1)}
    f.logs["silo-1"].append(f.logs["silo-1"][-1] | {"what": again})
    f.heads["silo-1"] = [(f.logs["silo-1"][-1], [])]


def called_lost(f, failures=1):
    """The sum of round 2, which the server has. ``failures``: of attempts, the later made up."""
    kept = f.find("server", "summed", -1)
    begun = f.what("server", "round", -1)
    log, made = f.logs["server"], []
    for attempt in range(failures):
        if attempt:
            again = begun | {"attempt": attempt, "header": header_of(f, begun, attempt)}
            made.append(kept | {"what": again})
        failed = {"kind": "failed", "round": 1, "attempt": attempt, "error": "ProtocolError"}
        made.append(kept | {"what": failed})
    made.append(kept | {"what": {"kind": "lost", "round": 1}})
    log[log.index(kept) : log.index(kept) + 1] = made


def called_lost_after_attempts_that_nobody_saw(f):
    called_lost(f, failures=2)


def dated(years):
    """The server's entries are of these years; the silos' are as they were."""

    def edit(f):
        for entry, year in zip(f.logs["server"], years, strict=False):
            entry["time"] = f"{year}-07-01T00:00:00Z"

    return edit


def without_logs_of_silos(edit):
    """Their countersignatures under the server's heads are left, and when they gave them."""

    def alone(f):
        edit(f)
        f.seal()
        for kind in ("logs", "heads"):
            for name in NAMES:
                del f.members[f"{kind}/{name}.{'jsonl' if kind == 'logs' else 'json'}"]
        return "sealed"

    return alone


SERVER_FORGERIES = [
    (
        "record",
        "clocks",
        without_logs_of_silos(dated(range(2101, 2201))),
        r"server#4 \(finished\): is dated 2105-07-01T00:00:00Z, over a day after silo-1 vouched",
    ),
    (
        "record",
        "clocks",
        without_logs_of_silos(dated([2026, *range(2001, 2101)])),
        r"server#1 \(round\): is dated 2001-07-01T00:00:00Z, over an hour before an earlier entry",
    ),
    (
        "record",
        "clocks",
        without_logs_of_silos(dated(range(2001, 2101))),
        r"server#5 \(round\): is dated 2006-.*, over a day before silo-1 vouched for less",
    ),
    ("alone", "attempts", attempt_left_out, r"silo-1#1 \(round\): the server's log hides this att"),
    ("record", "attempts", attempt_after_the_end, r"silo-1#17 \(round\): the server's log hides"),
    ("record", "lost", called_lost, r"server#8 \(lost\): called lost without two attempts that"),
    (
        "record",
        "lost",
        called_lost_after_attempts_that_nobody_saw,
        r"server#9 \(failed\): the failure of an attempt that too few silos know of",
    ),
    ("record", "clocks", dated(range(2001, 1901, -1)), r"server#1 \(round\): is dated 2000-07-01T"),
    (
        "record",
        "clocks",
        dated(range(2001, 2101)),
        r"server#1 \(round\): is dated 2002-.*, and sil",
    ),
]


@pytest.mark.parametrize(
    ("base", "check", "edit", "place"),
    SERVER_FORGERIES,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_false_history_of_the_server_alone_is_caught_by_one_check(
    request, tmp_path, base, check, edit, place
):
    forged = doctor(request.getfixturevalue(f"{base}_bundle"), tmp_path / "forged.zip", edit)
    (failed,) = verify(forged).failed
    assert failed.name == check
    assert any(re.search(place, fault) for fault in failed.faults), failed.faults


def test_logs_that_were_collected_before_a_silo_s_newest_attempt_are_no_lie(
    record_bundle, tmp_path
):
    """The server's log ends with round 1, and the silos' go on."""

    def collected_early(f):
        f.logs["server"] = f.logs["server"][:5]
        f.heads["server"] = f.heads["server"][:1]
        for name in NAMES:
            f.remove(name, "witnessed", -1)
            f.remove(name, "unmasked", -1)

    verdict = verify(doctor(record_bundle, tmp_path / "early.zip", collected_early))
    assert verdict.failed == []
    found = by_name(verdict)["attempts"].evidence
    assert found.endswith("; 12 of their entries are newer than the server's log")


# --- Who took part: an invented consortium --------------------------------------------------------


def known(*names, **other):
    return [f"{n}={k.public.hex()}" for n, k in ALL_KEYS.items() if n in names] + [
        f"{name.replace('_', '-')}={key}" for name, key in other.items()
    ]


def test_what_is_known_from_elsewhere_is_compared_and_the_rest_is_said(record_bundle, tmp_path):
    """Adversary: an outsider who makes up a study, five hospitals and their keys."""
    study = record_bundle.parent / "study.yaml"
    nothing = verify(record_bundle)
    assert by_name(nothing)["expected"].status == "not covered"
    assert len(nothing.not_compared) == 2
    assert nothing.keys == {n: k.public.hex() for n, k in ALL_KEYS.items() if n != "authority"}
    some = verify(record_bundle, expectation(study, known("silo-1")))
    assert some.holds
    assert by_name(some)["expected"].evidence == (
        "the study is the one named; 1 key as named; the rest was not compared"
    )
    (rest,) = some.not_compared
    assert rest.startswith("the owners of the keys: server, silo-2, silo-3, silo-4 (--key")
    every = verify(record_bundle, expectation(study, known("server", *NAMES)))
    assert every.not_compared == []
    other = tmp_path / "other.yaml"
    other.write_text(study.read_text().replace("rounds: 2", "rounds: 3"))
    for expected, fault in [
        (expectation(other, []), "study.json: is study "),
        (expectation(None, known(silo_1="ab" * 32)), "silo-1: has the key "),
        (expectation(None, known(hospital_9="ab" * 32)), "hospital-9 takes no part"),
    ]:
        (failed,) = verify(record_bundle, expected).failed
        assert failed.name == "expected"
        assert fault in failed.evidence


@pytest.mark.parametrize("text", ["silo-1", "silo-1=", "=" + "ab" * 32, "silo-1=abc", "silo-1=zz"])
def test_a_key_that_is_none_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="--key: "):
        expectation(None, [text])


# --- The study's signatures -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def signed_bundle(tmp_path_factory):
    """A study with a roster, signed by all, and its run."""
    roles = dict.fromkeys(NAMES, "silo") | {"server": "server"}
    roster = [
        {"name": name, "role": role, "key": ALL_KEYS[name].public.hex()}
        for name, role in roles.items()
    ]
    directory = tmp_path_factory.mktemp("signed") / "run"
    directory.mkdir()
    study = recorded_study(rounds=1, roster=roster, privacy=None)
    RecordedRun(directory, study).go()
    for name in roles:
        sign_study(study, name, ALL_KEYS[name], signatures_path(directory / "study.yaml"))
    assert len(read_envelope(signatures_path(directory / "study.yaml"), study).signatures) == 5
    path = directory / "evidence.zip"
    path.write_bytes(make_bundle(directory))
    return path


def test_a_signed_study_is_checked_against_its_roster(signed_bundle):
    verdict = verify(signed_bundle)
    assert verdict.holds
    assert by_name(verdict)["study-signed"].evidence.startswith("5 participants signed")
    own = verify(signed_bundle, expectation(signed_bundle.parent / "study.yaml", []))
    assert by_name(own)["expected"].evidence == "the study is the one named"
    assert own.not_compared == []  # the study names everybody's key
    assert by_name(verdict)["charged-first"].status == "not covered"  # no privacy is claimed


def envelope_edit(change):
    def edit(f):
        envelope = json.loads(f.members["study.signatures.json"])
        change(envelope)
        f.members["study.signatures.json"] = canonical(envelope)

    return edit


def test_a_bundle_joins_no_other_under_the_signatures_of_the_first(signed_bundle, tmp_path):
    """The first bundle's signatures are verified once, and count for the same bytes alone."""
    assert merge([signed_bundle, signed_bundle]) == signed_bundle.read_bytes()
    edit = envelope_edit(lambda e: e["signatures"].pop())
    forged = doctor(signed_bundle, tmp_path / "forged.zip", edit)
    with pytest.raises(EvidenceError, match="study-signed"):
        merge([signed_bundle, forged])


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda f: f.members.pop("study.signatures.json"), "missing: nobody signed"),
        (envelope_edit(lambda e: e["signatures"].pop()), "silo-4 has not signed"),
        (
            envelope_edit(lambda e: e["signatures"][0].update(sig=e["signatures"][1]["sig"])),
            "the signature of server does not verify",
        ),
        (envelope_edit(lambda e: e.update(payload="e30=")), "another version of the study"),
        (envelope_edit(lambda e: e.update(payload="?")), "is not a signature envelope"),
    ],
)
def test_a_study_that_not_everybody_signed_fails(signed_bundle, tmp_path, edit, fault):
    verdict = verify(doctor(signed_bundle, tmp_path / "forged.zip", edit))
    (result,) = verdict.failed
    assert result.name == "study-signed"
    assert fault in result.evidence


def test_signatures_from_nowhere_prove_nothing(signed_bundle, record_bundle, tmp_path):
    foreign = read_members(signed_bundle)["study.signatures.json"]
    edit = envelope_edit(lambda e: None)

    def paste(f):
        f.members["study.signatures.json"] = foreign
        edit(f)

    (result,) = verify(doctor(record_bundle, tmp_path / "forged.zip", paste)).failed
    assert result.name == "study-signed"


def test_participants_other_than_the_signed_ones_fail(signed_bundle, tmp_path):
    def swap(f):
        for log in f.logs.values():
            log[0]["what"]["roster"][1]["key"] = ALL_KEYS["silo-2"].public.hex()

    verdict = verify(doctor(signed_bundle, tmp_path / "forged.zip", swap))
    faults = by_name(verdict)["membership"].faults
    assert "server#0 (opened): its participants are not those of the signed study" in faults


# --- The archive ----------------------------------------------------------------------------------


@settings(max_examples=150)
@given(data=st.data())
def test_flipping_any_byte_makes_verify_fail(record_bundle, tmp_path_factory, data):
    content = bytearray(record_bundle.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    assert_broken(tmp_path_factory, bytes(content))


def assert_broken(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("flip") / "evidence.zip"
    path.write_bytes(content)
    verdict = verify(path)
    assert not verdict.holds
    assert [r.name for r in verdict.results] == ["archive"]
    return verdict


@settings(max_examples=60)
@given(data=st.data())
def test_flipping_any_byte_of_a_file_fails_even_under_a_mended_manifest(
    record_bundle, tmp_path_factory, data
):
    """Adversary: somebody without any key, who repairs manifest and archive."""
    members = read_members(record_bundle)
    del members["manifest.json"]
    name = data.draw(st.sampled_from(sorted(members)))
    content = bytearray(members[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("mended") / "evidence.zip"
    path.write_bytes(pack(members | {name: bytes(content)}))
    assert not verify(path).holds


def test_bytes_around_and_between_the_files_fail(record_bundle, tmp_path_factory, tmp_path):
    content = record_bundle.read_bytes()
    for extra in (content + b"\0", b"\0" + content, content[:-1], b"", content * 2):
        assert_broken(tmp_path_factory, extra)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("study.json", b"0" * 1000)
    found = assert_broken(tmp_path_factory, (tmp_path / "x.zip").read_bytes())
    assert "a compressed member" in found.results[0].evidence
    members = read_members(record_bundle)
    del members["manifest.json"]
    for change, message in [
        ({"notes.txt": b"hello"}, "notes.txt has no place in a bundle"),
        ({"logs/silo-9.jsonl": b""}, "logs/silo-9.jsonl breaks off"),
        ({"heads/silo-9.json": b"[]"}, "logs and signed heads do not pair up"),
        ({"study.json": b"{}"}, "study.json: study: this key is missing"),
        ({"heads/server.json": b'["x"]'}, "not a well-formed signed note"),
        ({"artefacts.json": b"[1]"}, "Expected `object`"),
    ]:
        found = assert_broken(tmp_path_factory, pack(members | change))
        assert message in found.results[0].evidence


def test_a_truncated_history_shows_as_unfinished_or_fails(record_bundle, tmp_path):
    """Adversary: whoever leaves out the newest entries and keeps an older cosigned head."""

    def cut(f):
        f.logs["server"] = f.logs["server"][:5]
        f.heads["server"] = f.heads["server"][:1]
        f.seal(cascade=False)
        return "sealed"

    failed = {r.name for r in verify(doctor(record_bundle, tmp_path / "forged.zip", cut)).failed}
    assert {"one-history", "transcripts"} <= failed


def test_one_silo_s_own_bundle_says_what_it_does_not_cover(record_bundle, tmp_path):
    directory = record_bundle.parent
    path = tmp_path / "mine.zip"
    path.write_bytes(make_bundle(directory, ["silo-2"]))
    verdict = verify(path)
    assert verdict.holds
    silent = {r.name for r in verdict.results if r.status == "not covered"}
    of_others = {"study-signed", "witnesses", "sbom", "artefacts", "transcripts"}
    of_others |= {"attempts", "lost"}
    assert silent == of_others | {"expected", "ciphertexts", "authority", "released-sum", "audits"}
    with pytest.raises(ConfigError, match="no evidence log of silo-7"):
        make_bundle(directory, ["silo-7"])


def test_verify_runs_alone_fast_and_without_torch(record_bundle, tmp_path):
    script = (
        "import sys, time; start = time.perf_counter()\n"
        "from securefedcollm_audits.__main__ import main\n"
        "try: main(['verify', sys.argv[1]])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'opacus', 'typer', 'rich'} & set(sys.modules)\n"
        "print(f'\\n{code} {sorted(heavy)} {time.process_time()}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(record_bundle)], capture_output=True, text=True
    )
    code, heavy, seconds = done.stdout.splitlines()[-1].split(" ")
    assert (code, heavy) == ("0", "[]")
    assert float(seconds) < 5  # of CPU: the machine may be busy
    assert "25 checks passed" in done.stdout


def test_the_module_s_exit_codes(record_bundle, tmp_path):
    broken = tmp_path / "broken.zip"
    broken.write_bytes(record_bundle.read_bytes()[:-7])
    for arguments, code in (
        (["verify", str(broken), "--json"], 1),
        (["verify", str(tmp_path / "nowhere.zip")], 2),
        (["verify"], 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "securefedcollm_audits", *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        if "--json" in arguments:
            assert json.loads(done.stdout)["results"][0]["status"] == "fail"
            assert json.loads(done.stdout)["sha256"] == sha256(broken.read_bytes()).hex()


def test_nothing_secret_is_in_a_bundle(record_bundle):
    """Adversary: a reader who looks for keys, the blinds, data-set fingerprints, ledger heads."""
    run = record_bundle.parent
    secrets = [key.seed() for key in ALL_KEYS.values()]
    secrets += [hashlib.sha256(name.encode()).digest() for name in NAMES]  # the data sets
    for name in NAMES:
        with Ledger(run / "silos" / name / "ledger.sqlite", name) as ledger:
            secrets += [row.digest for row in ledger.rows()]
    for path in run.rglob("evidence.sqlite"):
        ((blind,),) = sqlite3.connect(path).execute("SELECT value FROM own WHERE name = 'blind'")
        secrets.append(blind)
    assert len(secrets) == 6 + 4 + 4 * 6 + 5
    text = b"".join(read_members(record_bundle).values())
    for secret in secrets:
        for spelling in (secret, secret.hex().encode(), base64.b64encode(secret)[:42]):
            assert spelling not in text
