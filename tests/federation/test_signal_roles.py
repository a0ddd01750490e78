"""Pictures and recordings between real roles: every silo has a folder of files of its own.

Adversary: nobody new. What ``simulate`` does with a built-in world has to work for an organisation
whose files lie in its own directory, with the noise of a secure sum and evidence that holds.
"""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import pytest

from securefedcollm.federation.dealing import deal
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import load_study
from securefedcollm.tuning import pictures, sounds
from securefedcollm.tuning.question import Question
from tests.support.consortium import SILOS, evidence_holds, make_homes, play_roles
from tests.support.members import write_signed
from tests.support.pictures import tiny_study as vision_study
from tests.support.signals import TUNING
from tests.support.sounds import tiny_study as speech_study

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

KINDS: dict[str, Any] = {
    "image": (vision_study, {"views": 2, "shift": 0.1}),
    "audio": (speech_study, {"views": 2, "noise": 0.1}),
}


def write_records(questions: tuple[Question, ...], kind: str, directory: Path) -> Path:
    """PNG or WAV files in ``directory``, and the file of rows that names them."""
    (directory / "files").mkdir(parents=True)
    rows = []
    for number, question in enumerate(questions):
        name = f"files/{number:04d}.{'png' if kind == 'image' else 'wav'}"
        if kind == "image":
            grey = pictures.unfold(question.signal)[..., 0]
            pictures.pillow().fromarray(grey).save(directory / name)
        else:
            with wave.open(str(directory / name), "wb") as file:
                file.setparams((1, 2, sounds.RATE, 0, "NONE", ""))
                file.writeframes(sounds.unfold(question.signal).tobytes())
        label = None if question.answer is None else question.choices[question.answer]
        rows.append({kind: name, "label": label, "number": f"{directory.name}-{number}"})
    (directory / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return directory / "rows.jsonl"


@pytest.mark.parametrize("kind", KINDS)
def test_silos_with_folders_of_their_own_run_a_study(kind: str, tmp_path: Path) -> None:
    make, augmentation = KINDS[kind]
    homes, inputs = make_homes(tmp_path), tmp_path / "inputs"
    inputs.mkdir()
    world = make(inputs, local={**TUNING, "augmentation": augmentation})
    dealt = deal(world, inputs)
    tree = world.tree | {"task": {**world.tree["task"], "data": {}}}
    path = tmp_path / "tree.yaml"
    path.write_text(json.dumps(tree))
    file = write_signed(load_study(path), homes, tmp_path / "study.yaml")

    public = write_records(dealt.public, kind, tmp_path / "public")
    words: dict[str, list[Any]] = {"server": ["server", file, "--public", public]}
    for name in SILOS:
        own = write_records(dealt.silos[name], kind, tmp_path / "own" / name)
        words[name] = ["client", file, "--data", own, "--budget", "8"]
    play_roles(words, homes, inputs)

    evidence_holds(homes, tmp_path)
    for name, home in homes.items():
        (run,) = (home / "studies").iterdir()
        if name in SILOS:
            with Ledger(home / "ledger.sqlite", name) as ledger:
                entries = ledger.entries()
                worst = max(ledger.standing(ledger.stored(e.about.records)).worst for e in entries)
            assert entries
            assert 0 < worst <= 8
        assert (run / "adapters" / "slm" / "adapter_model.safetensors").is_file()
