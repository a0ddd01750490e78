"""Questions to documents between processes over mutual TLS on loopback, and on one machine.

``python -m benchmarks.asking --json`` gives the embedded world's four hospitals a consortium, a
signed study (``configs/retrieval.yaml``) and a shelf each. It starts ``shelf serve`` four times and
``shelf relay`` once, and has the server ask all four. The same questions go to the same shelves
with every role in one process. Makes the built-in encoder if it is not there: about a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from securefedcollm.federation.questions.space import space_of
from securefedcollm.study import Study, load_study
from securefedcollm.study.identity import open_identity, read_identity
from securefedcollm.study.signing import sign_study, signatures_path

SILOS = ("silo-1", "silo-2", "silo-3", "silo-4")
ASKER = "server"
QUESTION = "at meridian {} patient with mild quiboritis enters ward"
COMMAND = "from securefedcollm_cli.main import main; main()"


def signed_study(homes: dict[str, Path], place: Path) -> Study:
    """``configs/retrieval.yaml`` with a roster and pins, signed by everybody."""
    plain = load_study("retrieval")
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
        [sys.executable, "-c", COMMAND, "shelf", *map(str, words)], stdout=subprocess.DEVNULL
    )


def over_network(
    study: Study, homes: dict[str, Path], place: Path, shelves: dict[str, Path], count: int
) -> dict[str, Any]:
    file = place / "study.yaml"
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in SILOS:
            words = ("serve", file, "--index", shelves[name], "--home", homes[name], "--yes")
            processes[name] = stack.enter_context(start(*words))
        processes["server"] = stack.enter_context(start("relay", file, "--home", homes["server"]))
        for process in processes.values():
            stack.callback(process.terminate)
        began = time.monotonic()
        first = _ask_when_ready(study, homes[ASKER], place)
        ready = time.monotonic() - began
        answers, crossed = [], loopback_bytes()
        for number in range(count):
            question = QUESTION.format(("young", "old", "senior")[number % 3])
            answers.append(sfc.ask(question, study, home=homes[ASKER], data=place))
        crossed = loopback_bytes() - crossed
        memory = {name: peak_memory(process.pid) for name, process in processes.items()}
    assert all(answer.answered == list(SILOS) for answer in (first, *answers))
    return {
        "ready_s": round(ready, 1),
        "seconds": [round(answer.seconds, 3) for answer in answers],
        "median_s": round(statistics.median(answer.seconds for answer in answers), 3),
        "bytes_up": answers[0].sent,
        "bytes_down": answers[0].received,
        "loopback_bytes": round(crossed / count),
        "silo_peak_mb": round(max(memory[name] for name in SILOS)),
        "server_peak_mb": round(memory["server"]),
        "evidence_holds": sfc.verify(answers[-1].bundle()).holds,
    }


def _ask_when_ready(study: Study, home: Path, place: Path) -> Any:
    """The first answer of all silos: they need some seconds to connect."""
    question, deadline = QUESTION.format("young"), time.monotonic() + 180
    while True:
        with contextlib.suppress(ConfigError, TransportError):
            answer = sfc.ask(question, study, home=home, data=place)
            if answer.answered == list(SILOS):
                return answer
        if time.monotonic() > deadline:
            raise TimeoutError("the silos did not all answer")
        time.sleep(1)


def here(place: Path, shelves: dict[str, Path], count: int) -> dict[str, Any]:
    """Every role in this process, by the study without its roster."""
    tree = yaml.safe_load((place / "study.yaml").read_text())
    del tree["roster"]
    (place / "plain.yaml").write_text(yaml.safe_dump(tree))
    answers = [
        sfc.ask(
            QUESTION.format("old"),
            place / "plain.yaml",
            shelves=shelves,
            asker=ASKER,
            out=place / "run",
            data=place,
        )
        for _ in range(count)
    ]
    return {"median_s": round(statistics.median(answer.seconds for answer in answers), 3)}


def measure(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        homes = consortium(place / "consortium", SILOS)
        study = signed_study(homes, place)
        shelves = {
            silo: sfc.build_index(
                study, [f"builtin:{silo}"], place / f"{silo}.index", data=place
            ).path
            for silo in SILOS
        }
        found = over_network(study, homes, place, shelves, count)
        alone = here(place, shelves, count)
    return {
        "benchmark": "asking",
        "silos": len(SILOS),
        "questions": count,
        "network": found,
        "one_process": alone,
        "machine": machine("nvflare", "numpy"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=9, help="to measure")
    parser.add_argument("--json", action="store_true", help="(the only format)")
    print(json.dumps(measure(parser.parse_args().questions)))


if __name__ == "__main__":
    main()
