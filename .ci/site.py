"""What MkDocs does not do by itself (`hooks` of mkdocs.yml): runs in the site's own environment.

Pages of the repository that are not in docs/ join the site, and their links follow. Notebooks
become pages. A file of the code that a page links to is copied beside it. No page may fetch
anything from another host: whoever reads about privacy is not told to a third party.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
JOINING = {
    "README.md": "project/readme.md",
    "SECURITY.md": "project/security.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "audits/README.md": "project/audits.md",
}
"""Path in the repository → place on the site."""
_LINK = re.compile(r"(\]\()(?!#|[a-z]+:)([^)#\s]+)([^)]*\))")
_ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):<code>~?([\w.]+)</code>")
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\ssrc=\"?(?:https?:)?//[^>]*>"
    r"|<link\b(?![^>]*rel=\"?canonical)[^>]*\shref=\"?(?:https?:)?//[^>]*>"
    r"|class=\"?mermaid"  # Material fetches Mermaid from elsewhere
)


def on_files(files: Files, *, config: Any) -> Files:
    """Pages from elsewhere join, and all links say where things are on the site."""
    origins = {file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()}
    for origin, place in JOINING.items():
        origins[place] = origin
        files.append(File.generated(config, place, content=(ROOT / origin).read_text()))
    for notebook in (ROOT / "docs").glob("*.ipynb"):
        place = f"{notebook.stem}.md"
        origins[place] = f"docs/{notebook.name}"
        files.append(File.generated(config, place, content=_page(notebook)))
    for place, origin in origins.items():
        page = files.get_file_from_path(place)
        assert page is not None
        page.content_string = _relinked(page.content_string, place, origin, files, config)
    return files


def _page(notebook: Path) -> str:
    """A notebook as Markdown; its code cells are not run."""
    parts = [f"[This page as a notebook]({notebook.name}){{ download }}"]
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts[:2] = reversed(parts[:2])  # the first cell has the title
    return "\n\n".join(parts) + "\n"


def _relinked(text: str, place: str, origin: str, files: Files, config: Any) -> str:
    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link[2]))
        to = JOINING.get(target) or target.removeprefix("docs/")
        if to == target:  # not a page: the file itself
            to = f"repository/{target}"
            if not files.get_file_from_path(to) and (ROOT / target).is_file():
                files.append(File.generated(config, to, abs_src_path=str(ROOT / target)))
        relative = posixpath.relpath(to, posixpath.dirname(place) or ".")
        return f"{link[1]}{relative}{link[3]}"

    return _LINK.sub(moved, text)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings become links."""
    return _ROLE.sub(
        lambda role: (
            f'<autoref optional identifier="{role[1]}"><code>{role[1].rpartition(".")[2]}</code>'
            "</autoref>"
        ),
        html,
    )


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Adversary: whoever runs another host, and would learn who reads what."""
    if found := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: fetches from elsewhere: {found[0][:200]}")
    return output
