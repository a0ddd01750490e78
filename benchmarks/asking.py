"""Questions to documents, or records, between processes over mutual TLS on loopback, and on one
machine.

``python -m benchmarks.asking --json`` gives the embedded world's four hospitals a consortium, a
signed study (``configs/retrieval.yaml``) and a shelf each. It starts ``shelf serve`` four times and
``shelf relay`` once, and has the server ask all four. The same questions go to the same shelves
with every role in one process. Makes the built-in encoder if it is not there: about a minute.

``--answers`` does the same with ``configs/answers.yaml`` and the records that it deals out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

import securefedcollm as sfc
from benchmarks._machine import machine
from benchmarks.engine import consortium, loopback_bytes, peak_memory
from securefedcollm.errors import ConfigError, TransportError
from securefedcollm.federation.dealing import deal, read_records
from securefedcollm.federation.questions.space import space_of
from securefedcollm.simulation.polling import Polls
from securefedcollm.study import Study, load_study
from securefedcollm.study.identity import open_identity, read_identity
from securefedcollm.study.signing import sign_study, signatures_path

SILOS = ("silo-1", "silo-2", "silo-3", "silo-4")
ASKER = "server"
QUESTION = "at meridian {} patient with mild quiboritis enters ward"
ASKED = "at meridian {} patient with mild kolvexmalacia follows protocol"
CHOICES = ("amber", "violet", "crimson", "azure")
COMMAND = "from securefedcollm_cli.main import main; main()"


def signed_study(homes: dict[str, Path], place: Path, name: str) -> Study:
    """A shipped study with a roster and pins, signed by everybody."""
    plain = load_study(name)
    space, tree = space_of(plain), plain.tree
    (place / "public.map").write_bytes(space.reduction.encode())
    tree["retrieval"]["encoder"]["sha256"] = space.encoder.digest
    pin = {"source": "path:public.map", "sha256": space.reduction.digest.hex()}
    tree["retrieval"]["reduction"] = pin
    identities = {name: read_identity(home / "identity.json") for name, home in homes.items()}
    tree["roster"] = [
        {"name": name, "role": "server" if name == "server" else "silo", "key": identity.public}
        for name, identity in identities.items()
    ]
    path = place / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    study = load_study(path)
    for name, identity in identities.items():
        sign_study(study, name, open_identity(identity, None), signatures_path(path))
    return study


def start(*words: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "shelf", *map(str, words)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # four silos embed on this machine's cores
    )


def records_of(study: Study, place: Path) -> dict[str, Path]:
    """Silo → a file with the records that the study deals out to it."""
    files = {}
    for silo, questions in deal(study, None).silos.items():
        files[silo] = place / f"{silo}.jsonl"
        with files[silo].open("w") as file:
            for one in questions:
                row = {"question": one.prompt, "choices": [*one.choices], "answer": one.answer}
                file.write(json.dumps(row) + "\n")
    return files


def ask_over(study: Study, home: Path, place: Path, number: int) -> Any:
    """The answer over the network, and the silos that are in it."""
    who = ("young", "old", "senior")[number % 3]
    if answers(study):
        vote = sfc.ask_records_from(home, ASKED.format(who), CHOICES, study)
        return vote, list(vote.counted)
    answer = sfc.ask(QUESTION.format(who), study, home=home, data=place)
    return answer, answer.answered


def answers(study: Study) -> bool:
    return study.retrieval is not None and study.retrieval.mode == "answers"


def over_network(
    study: Study, homes: dict[str, Path], place: Path, own: dict[str, Path], count: int
) -> dict[str, Any]:
    file = place / "study.yaml"
    option = "--records" if answers(study) else "--index"
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in SILOS:
            words = ("serve", file, option, own[name], "--home", homes[name], "--yes")
            words += ("--models", place) if answers(study) else ()
            processes[name] = stack.enter_context(start(*words))
        processes["server"] = stack.enter_context(start("relay", file, "--home", homes["server"]))
        for process in processes.values():
            stack.callback(process.terminate)
        began = time.monotonic()
        first = _ask_when_ready(study, homes[ASKER], place)
        ready = time.monotonic() - began
        found, crossed = [], loopback_bytes()
        for number in range(count):
            found.append(ask_over(study, homes[ASKER], place, number))
        crossed = loopback_bytes() - crossed
        memory = {name: peak_memory(process.pid) for name, process in processes.items()}
    assert all(silos == list(SILOS) for _, silos in (first, *found))
    every = [answer for answer, _ in found]
    return {
        "ready_s": round(ready, 1),
        "seconds": [round(answer.seconds, 3) for answer in every],
        "median_s": round(statistics.median(answer.seconds for answer in every), 3),
        "bytes_up": every[0].sent,
        "bytes_down": every[0].received,
        "loopback_bytes": round(crossed / count),
        "silo_peak_mb": round(max(memory[name] for name in SILOS)),
        "server_peak_mb": round(memory["server"]),
        "evidence_holds": sfc.verify(every[-1].bundle()).holds,
    }


def _ask_when_ready(study: Study, home: Path, place: Path) -> Any:
    """The first answer of all silos: they embed their records first."""
    deadline = time.monotonic() + 300
    while True:
        with contextlib.suppress(ConfigError, TransportError):
            answer, silos = ask_over(study, home, place, 0)
            if silos == list(SILOS):
                return answer, silos
        if time.monotonic() > deadline:
            raise TimeoutError("the silos did not all answer")
        time.sleep(1)


def here(place: Path, shelves: dict[str, Path], count: int) -> dict[str, Any]:
    """Every role in this process, by the study without its roster."""
    plain = without_roster(place)
    if answers(plain):
        with Polls(
            plain,
            records={name: read_records(plain, file) for name, file in shelves.items()},
            asker=ASKER,
            directory=place / "run",
            space=space_of(plain, place),
            data=place,
        ) as polls:
            took = [polls.ask(ASKED.format("old"), CHOICES).seconds for _ in range(count)]
        return {"median_s": round(statistics.median(took), 3)}
    every = [
        sfc.ask(
            QUESTION.format("old"),
            plain,
            shelves=shelves,
            asker=ASKER,
            out=place / "run",
            data=place,
        )
        for _ in range(count)
    ]
    return {"median_s": round(statistics.median(answer.seconds for answer in every), 3)}


def without_roster(place: Path) -> Study:
    tree = yaml.safe_load((place / "study.yaml").read_text())
    del tree["roster"]
    (place / "plain.yaml").write_text(yaml.safe_dump(tree))
    return load_study(place / "plain.yaml")


def measure(count: int, study_name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        homes = consortium(place / "consortium", SILOS)
        study = signed_study(homes, place, study_name)
        own = records_of(study, place) if answers(study) else shelves_of(study, place)
        found = over_network(study, homes, place, own, count)
        alone = here(place, own, count)
    return {
        "benchmark": "asking",
        "study": study_name,
        "silos": len(SILOS),
        "questions": count,
        "network": found,
        "one_process": alone,
        "machine": machine("nvflare", "numpy"),
    }


def shelves_of(study: Study, place: Path) -> dict[str, Path]:
    return {
        silo: sfc.build_index(study, [f"builtin:{silo}"], place / f"{silo}.index", data=place).path
        for silo in SILOS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=9, help="to measure")
    parser.add_argument("--json", action="store_true", help="(the only format)")
    parser.add_argument("--answers", action="store_true", help="ask records, not documents")
    given = parser.parse_args()
    print(json.dumps(measure(given.questions, "answers" if given.answers else "retrieval")))


if __name__ == "__main__":
    main()
