"""docs/transport.md: the roles over somebody's own carrier."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "transport.md"


def test_the_page_on_ones_own_transport(tmp_path: Path) -> None:
    roles, started = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in roles.splitlines() if line.strip()]) <= 40
    program = f"{roles}\n{started}\nfrom pathlib import Path\nmain(Path({str(tmp_path)!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "[ 0  6 12 18]\n", done.stderr
    assert all((tmp_path / f"clinic-{i}").is_dir() for i in (1, 2, 3))  # their journals
