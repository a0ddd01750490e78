"""YAML → :class:`Study`, with errors that name the key path and the fix."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import yaml

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import visible
from securefedcollm.study.bounds import check_plain
from securefedcollm.study.checks import check
from securefedcollm.study.config import Study

# A study is a page of text, and a list of those who take part. 10,000 silos with names of about 30
# characters are 1.3 MB and 70,000 values. A larger file is a mistake or an attack.
_MAX_BYTES = 4 << 20
_MAX_NODES = 100_000
_MAX_DEPTH = 32
_MAX_NUMBER = 400  # characters of what is no text


class StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads 1e-5 as the number that it is.

    Adversary: the file's author, by nesting, by sheer number, or by aliases that unfold to more.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}
        """Nodes under each node, every alias unfolded."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        before = self._nodes
        self._nodes += 1
        self._depth += 1
        if self._depth > _MAX_DEPTH or self._nodes > _MAX_NODES:
            what = "nested too deeply" if self._depth > _MAX_DEPTH else "of too many values"
            raise ConfigError(f"{what} for a study", hint="is this the study file?")
        node: yaml.Node | None = super().compose_node(parent, index)
        if alias:
            self._nodes += self._sizes.get(id(node), _MAX_NODES)  # unknown: it holds itself
        else:
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > _MAX_NODES:
            raise ConfigError("its aliases unfold to too much", hint="write out the values")
        self._depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and len(value) > _MAX_NUMBER:
            implicit = (False, implicit[1])  # a text: numbers of that length take forever to read
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def construct_scalar(self, node: Any) -> Any:
        if node.tag != "tag:yaml.org,2002:str" and len(node.value) > _MAX_NUMBER:
            raise ConfigError("a value that long is a text", hint="remove its tag")
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"a key is a list or mapping (line {key.start_mark.line + 1})",
                    hint="keys are words",
                )
            if key.value in seen:
                raise ConfigError(
                    f"the key {key.value!r} is given twice (line {key.start_mark.line + 1})",
                    hint="keep one of the two",
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_study(
    study: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
) -> Study:
    """Read, override and check a study.

    Args:
        study: the YAML file; the name of a study that is :func:`shipped`, such as ``quickstart``;
            or what such a file would hold.
        overrides: ``key.path=value`` strings, values in YAML (``privacy=null`` switches it off); or
            values by key path, as in ``{"rounds": 2, "privacy.epsilon": 4}``.

    Raises:
        ConfigError: naming the file or key path, and the fix.
    """
    tree = (
        json.loads(_written("study", study))
        if isinstance(study, Mapping)
        else _parse(read_text(Path(study)), str(study))
    )
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={_written(key, value)}" for key, value in overrides.items()]
    for override in overrides or ():
        change(tree, override)
    return study_from_tree(tree)


def _written(key: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"cannot be written in a study ({error})", where=key, hint="give a number, text or list"
        ) from None


def study_from_tree(tree: Any) -> Study:
    """A checked study from plain dictionaries, as YAML or JSON gives them."""
    if not isinstance(tree, dict):
        raise ConfigError(
            "a study must be a mapping of keys", where="study", hint="see configs/quickstart.yaml"
        )
    check_plain(tree)
    if tree.get("privacy") == "none":
        tree = {**tree, "privacy": None}
    models = tree.get("models")
    if isinstance(models, dict) and models.get("llm") == "none":
        tree = {**tree, "models": {**models, "llm": None}}
    try:
        study = msgspec.convert(tree, Study)
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    check(study)
    return study


def dump_study(study: Study) -> str:
    """The study as YAML, every default written out; loads to the same digest.

    Adversary: the study's author. Where a character would not show, all is spelled in ASCII.
    """
    text: str = yaml.safe_dump(study.tree, sort_keys=False, allow_unicode=True, width=100)
    if visible(text) == text:
        return text
    return yaml.safe_dump(study.tree, sort_keys=False, allow_unicode=False, width=100)


def shipped() -> dict[str, Path]:
    """The studies that come with this project, by name; a file of that name goes before."""
    here = Path(__file__).parents[1]
    places = (here / "studies", here.parent / "configs")  # of a wheel, of a clone
    found = next((place for place in places if (place / "quickstart.yaml").is_file()), None)
    return {} if found is None else {path.stem: path for path in sorted(found.glob("*.yaml"))}


def read_text(path: Path) -> str:
    """The text of a study's file, or of a study that is :func:`shipped`.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(
                f"the file is over {_MAX_BYTES >> 20} MiB",
                where=str(path),
                hint="is this the study file?",
            )
        return content.decode("utf-8")
    except FileNotFoundError:
        known = shipped()
        if str(path) in known:
            return known[str(path)].read_text(encoding="utf-8")
        raise ConfigError(
            "there is no such file",
            where=str(path),
            hint="give a study's file, or the name of one that comes with securefedcollm: "
            f"{', '.join(known)}",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read ({error})", where=str(path), hint="give a readable UTF-8 YAML file"
        ) from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=StrictLoader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        if getattr(error, "problem", None) == "but found another document":
            raise ConfigError(
                "holds several studies, one after another",
                where=where,
                hint="`simulate` plays them; every other command takes a file with one study",
            ) from None
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(
            f"{problem}{line}", where=where, hint="correct the YAML syntax at that line"
        ) from None
    except ConfigError as error:
        raise ConfigError(error.message, where=where, hint=error.hint) from None
    except Exception as error:  # PyYAML raises a dozen kinds on a number or date that is none
        raise ConfigError(
            f"a value cannot be read ({type(error).__name__}: {str(error)[:120]})",
            where=where,
            hint="put a text in quotes",
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            "a study must be a mapping of keys", where=where, hint="see configs/quickstart.yaml"
        )
    return tree


def change(tree: dict[str, Any], override: str) -> None:
    """Set one key of plain values, in place, as ``key.path=value`` says.

    Raises:
        ConfigError: it is no such text.
    """
    path, found, text = override.partition("=")
    keys = path.strip().split(".")
    if not found or not all(keys):
        raise ConfigError(
            f"{override!r} is not key=value", where="--set", hint="e.g. --set local.steps=20"
        )
    value = _parse(f"value: {text}", f"--set {path}")["value"]
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"{key!r} holds a plain value, not a section",
                where=f"--set {path}",
                hint=f"set {key}={{…}} as a whole",
            )
        node = child
    node[keys[-1]] = value


_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_FIELD = re.compile(r"`(?P<field>[^`]+)`")


def _explain(error: msgspec.ValidationError) -> ConfigError:
    """Turn msgspec's message into ours: key path first, then what is wrong, then the fix."""
    match = _PLACE.match(str(error))
    what, path = (match["what"], match["path"] or "") if match else (str(error), "")
    path = path.replace("[...]", "[]")
    field = _FIELD.search(what)
    if what.startswith("Object contains unknown field") and field:
        name = field["field"]
        known = _fields_at(path)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return ConfigError("unknown key", where=_join(path, name), hint=hint)
    if what.startswith("Object missing required field") and field:
        return ConfigError(
            "this key is missing",
            where=_join(path, field["field"]),
            hint="add it; configs/quickstart.yaml shows every section",
        )
    if "null" in what and path in {"", "privacy"}:
        what = what.replace("| null", "or `none`")
    return ConfigError(
        what[0].lower() + what[1:],
        where=path or "study",
        hint="run `securefedcollm study schema` for every key, its type and its default",
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _fields_at(path: str) -> list[str]:
    """Names of the keys that the section at ``path`` knows."""
    section: Any = Study
    for key in filter(None, path.replace("[]", "").split(".")):
        names = dict(zip(section.__struct_encode_fields__, section.__struct_fields__, strict=True))
        hint = get_type_hints(section, include_extras=False).get(names.get(key, key))
        options = [hint, *get_args(hint)]
        section = next((o for o in options if isinstance(o, type) and _is_section(o)), None)
        if section is None:
            return []
    return list(section.__struct_encode_fields__)


def _is_section(kind: type) -> bool:
    return issubclass(kind, msgspec.Struct)
