"""What a wheel has and a clone does not: the studies of configs/ inside the package."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Studies(BuildHookInterface):  # type: ignore[type-arg]
    """Not for editable installs: a directory of ours in site-packages would hide the clone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            configs = str(Path(self.root) / "configs")
            build_data["force_include"][configs] = "securefedcollm/studies"
