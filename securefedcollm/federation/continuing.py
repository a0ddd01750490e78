"""The starting point of a study that continues earlier runs, and the study that continues a run.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.evidence.entries import Finished
from securefedcollm.evidence.log import FILE_NAME, EvidenceLog
from securefedcollm.evidence.many import silos_of
from securefedcollm.federation.keeping import BEST
from securefedcollm.primitives import sha256
from securefedcollm.study import Study, digest, load_study
from securefedcollm.study.config import Model
from securefedcollm.study.continuing import Earlier, ModelName

if TYPE_CHECKING:
    from securefedcollm.tuning.folding import Released

_ADAPTER = "adapter_model.safetensors"
_LOWRANK = frozenset({"ffa-lora", "rolora", "lora"})


_beside: ContextVar[tuple[Path, ...]] = ContextVar("beside", default=())


@contextmanager
def beside(run: Path) -> Iterator[None]:
    """Within it, earlier runs are looked for beside the directory ``run``, too.

    A study then names them without a path of anybody's machine. Adversary: whoever puts another
    file there. Its digest is not the one that the study names.
    """
    token = _beside.set((run.absolute().parent, *_beside.get()))
    try:
        yield
    finally:
        _beside.reset(token)


def name_of(study: Study, spec: Model) -> ModelName:
    """Which of the study's models ``spec`` is; by identity, since both may be the same model."""
    return "llm" if spec is study.models.llm else "slm"


def released(study: Study, model: ModelName, data: Path | None) -> tuple[Released, ...]:
    """The adapters that the study folds into one of its models, oldest first.

    Raises:
        ConfigError: a file is missing, or is not the one that the study names.
    """
    from securefedcollm.tuning.folding import read_released

    if study.continues is None:
        return ()
    found = []
    for number, link in enumerate(study.continues.earlier):
        wanted = link.of(model)
        if wanted is None:
            continue
        found.append(
            read_released(
                list(_places(data or Path(), link, model)),
                wanted,
                scale=link.scale,
                max_abs=study.adapter.max_abs,
                where=f"continue.earlier[{number}].run",
            )
        )
    return tuple(found)


def base_of(study: Study, model: ModelName, raw: bytes) -> bytes:
    """Identifies the base that the study tunes: ``raw``, with all that is folded into it."""
    return raw if study.continues is None else study.continues.base(model, raw)


def seed_of(study: Study) -> int:
    """Seed of a new adapter: it differs between the studies of a chain, whose seeds may be equal.

    With the same A, a new adapter could only repeat what the earlier one can express.
    """
    if study.continues is None:
        return study.seed
    links = [bytes.fromhex(link.slm) for link in study.continues.earlier]
    text = f"{study.seed}\0".encode()
    return int.from_bytes(sha256(b"securefedcollm/next-adapter/v1\0", text, *links)[:6], "big")


def run_places(data: Path, link: Earlier) -> Iterator[Path]:
    """Where the earlier run's directory may lie: :func:`beside` the run, or below ``data``."""
    for place in (*_beside.get(), data):
        yield place / link.run
        # as participants' homes name it
        yield from sorted(place.glob(f"*-{link.study[:12]}"))


def earlier_bundles(study: Study, data: Path | None) -> list[Path]:
    """The bundles of evidence in the earlier runs' directories; none that is another study's."""
    found = []
    for link in study.continues.earlier if study.continues else []:
        places = [place for place in run_places(data or Path(), link) if _ran(place, link)]
        found += [place / "evidence.zip" for place in places][:1]
    return found


def _ran(place: Path, link: Earlier) -> bool:
    """Whether that directory has the evidence of the study that ``link`` names."""
    if not (place / "evidence.zip").is_file():
        return False
    try:
        return digest(load_study(place / "study.yaml")).hex() == link.study
    except SecureFedCoLLMError:  # whatever else lies there
        return False


def _places(data: Path, link: Earlier, model: ModelName) -> Iterator[Path]:
    for run in run_places(data, link):
        for room in ("adapters", BEST, ""):
            yield run / room / model / _ADAPTER


def continued(run: Path, place: str, *, best: bool = False) -> tuple[Study, list[Earlier]]:
    """The study of a finished run, and the chain with which the next one starts from it.

    Args:
        run: the directory of the server, or of a simulation.
        place: what the next study's participants call it.
        best: start from the best round's adapters instead of the last one's.

    Raises:
        ConfigError: there is no finished run there, or its adapters cannot be folded, or are
            not those that its evidence names.
    """
    study = _finished(run)
    path = run / "server" / FILE_NAME
    if not path.is_file():
        raise ConfigError(
            "holds no evidence log of the server",
            where=str(run),
            hint="continue from the directory of the server, or of a simulation",
        )
    silos = silos_of(study, run)
    log = EvidenceLog(path, study=digest(study), owner="server", key=None, silos=silos)
    head, made = log.head, [e.what.files for e in log.entries if isinstance(e.what, Finished)]
    log.close()
    room = run / (BEST if best else "adapters")
    found = {}
    for model in ("slm", "llm"):
        file = room / model / _ADAPTER
        if not file.is_file():
            continue
        found[model] = sha256(file.read_bytes()).hex()
        if all(files.get(f"{model}/{_ADAPTER}") != found[model] for files in made):
            raise ConfigError(
                "is not what any round of the run released, by its own evidence",
                where=str(file),
                hint="restore the run's own file",
            )
    if "slm" not in found:
        raise ConfigError(
            f"there is no {_ADAPTER} in {room / 'slm'}",
            where=str(run),
            hint="continue a finished run" if not best else "leave out --best",
        )
    link = Earlier(
        run=place,
        study=digest(study).hex(),
        entries=head.size,
        root=head.root.hex(),
        scale=study.adapter.alpha / study.adapter.rank,
        slm=found["slm"],
        llm=found.get("llm"),
    )
    before = study.continues.earlier if study.continues else []
    return study, [*before, link]


def _finished(run: Path) -> Study:
    if not (run / "study.yaml").is_file():
        raise ConfigError(
            "is not a run directory", where=str(run), hint="name the directory given to --out"
        )
    study = load_study(run / "study.yaml")
    if study.adapter.method == "full":
        raise ConfigError(
            "the run released a whole model, so there is nothing to fold",
            where=str(run),
            hint="name it as the next study's base: `models.slm.source: path:DIR`, with "
            f"{run / 'adapters' / 'slm'}",
        )
    if study.adapter.method not in _LOWRANK:
        raise ConfigError(
            f"a {study.adapter.method} cannot be folded into weights",
            where=str(run),
            hint="continue a run of ffa-lora, rolora or lora; virtual tokens stand before every "
            "input, and no weight can hold them",
        )
    if not (run / "results.json").is_file():
        raise ConfigError(
            "the run is not finished", where=str(run), hint="go on with it first (--resume)"
        )
    return study


def next_tree(study: Study, chain: list[Earlier], orthogonal: bool) -> dict[str, Any]:
    """The plain keys of the study that goes on after ``study``: the same except for its name, the
    roster's signatures and its starting point."""
    stem, _, number = study.study.rpartition("-")
    named = f"{stem}-{int(number) + 1}" if stem and number.isdigit() else f"{study.study}-2"
    return with_chain(study.tree | {"study": named}, chain, orthogonal)


def with_chain(tree: dict[str, Any], chain: list[Earlier], orthogonal: bool) -> dict[str, Any]:
    """``tree`` with the study's starting point."""
    links = [
        {key: value for key, value in msgspec.to_builtins(link).items() if value is not None}
        for link in chain
    ]
    return tree | {"continue": {"earlier": links} | ({"orthogonal": True} if orthogonal else {})}
