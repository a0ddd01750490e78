"""Look at a page in headless Chromium, with nothing but the standard library.

The page is put into frames of several widths on a page of ours, whose script measures them; so the
page itself needs no script, and may forbid them.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

BINARY = os.environ.get("SECUREFEDCOLLM_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
WHY_NOT = "needs Chromium on the PATH, or its path in SECUREFEDCOLLM_CHROMIUM"

_SCRIPT = """
addEventListener("load", () => setTimeout(() => {
  const seen = [...document.querySelectorAll("iframe")].map((frame) => {
    const root = frame.contentDocument.documentElement;
    return {
      width: root.clientWidth, needed: root.scrollWidth, height: root.scrollHeight,
      text: frame.contentDocument.body.innerText.length,
      plots: [...frame.contentDocument.querySelectorAll("svg")].map(
        (plot) => plot.getBoundingClientRect().height),
      fetched: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
    };
  });
  document.body.dataset.seen = JSON.stringify(seen);
}, 300));
"""


def look(page: str, directory: Path, widths: tuple[int, ...]) -> tuple[list[dict], list[str]]:
    """What each width shows, and what the console said."""
    frames = "".join(
        f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(page)}">'
        "</iframe>"
        for width in widths
    )
    file = directory / "frames.html"
    file.write_text(f"<!doctype html><body>{frames}<script>{_SCRIPT}</script></body>")
    done = _run(directory, "--dump-dom", "--virtual-time-budget=5000", file.as_uri())
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(found[1])), console


def print_pdf(page: str, directory: Path) -> bytes:
    """The page as it is printed."""
    file, pdf = directory / "page.html", directory / "page.pdf"
    file.write_text(page)
    _run(directory, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", file.as_uri())
    return pdf.read_bytes()


def _run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BINARY is not None
    return subprocess.run(
        [
            BINARY,
            "--headless=new",
            "--no-sandbox",  # the page is ours, and containers have no other
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            f"--user-data-dir={directory / 'profile'}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
