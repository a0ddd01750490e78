"""The look that the HTML reports share: one self-contained page, light or dark, that prints well.

No script, no font, nothing fetched: what an officer files today reads the same in ten years.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from securefedcollm.foreign import visible

STYLE = """
:root { color-scheme: light dark; --ink: #1a2430; --soft: #52606d; --line: #d7dde4; --back: #fff;
  --tint: #eef4fb; --blue: #2b6cb0; --red: #c53030; --green: #276749; --amber: #975a16; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa5b1; --line: #3e4c59;
  --back: #14191f; --tint: #1f2933; --blue: #63b3ed; --red: #fc8181; --green: #68d391;
  --amber: #f6ad55; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--back); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
a { color: var(--blue); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
pre { white-space: pre-wrap; }
code { font-size: .85em; overflow-wrap: anywhere; }
.claim { background: var(--tint); border-left: 4px solid var(--blue); padding: .7rem 1rem; }
.claim.bad { border-color: var(--red); }
.note { color: var(--soft); font-size: .9rem; }
.pass { color: var(--green); } .fail { color: var(--red); font-weight: 600; }
.open { color: var(--amber); }
.kind { border: 1px solid var(--line); padding: .4rem .8rem; }
.kind.unreal { border-color: var(--amber); } .kind.unreal b { color: var(--amber); }
.facts th { width: 11rem; } .facts td { overflow-wrap: anywhere; } .key { padding-left: 1.2rem; }
.sign { display: none; }
.ref { font-size: .8rem; white-space: nowrap; }
svg { width: 100%; min-width: 30rem; max-width: 46rem; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--soft); }
@media screen and (max-width: 40rem) { svg { min-width: 0; } svg text { font-size: 18px; }
  .prose { min-width: 10rem; } body { padding: 0 .7rem; } th, td { padding: .25rem .4rem; }
  td:first-child { min-width: 4rem; } .facts th { width: 6.5rem; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --tint: #f2f2f2;
  --blue: #1a4f8a; --red: #a32020; --green: #1c5237; --amber: #7a4a10; }
  html { font-size: 11px; } body { margin: 0; max-width: none; font-size: 1rem; }
  h2, h3, h2 + p, h3 + p, tr:first-child { break-after: avoid; }
  tr, svg, .claim, .sign { break-inside: avoid; }
  .sign { display: block; margin-top: 2rem; } .lines { display: flex; gap: 2rem; }
  .lines span { flex: 1; border-top: 1px solid var(--ink); margin-top: 3.5rem; }
  a { text-decoration: none; } .wide { overflow: visible; }
}
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
"""What a browser may do with a page: nothing but show it, whatever a forged value smuggles in."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720.0, 220.0, 44.0, 30.0


def page(title: str, body: str) -> str:
    """The whole document. ``title`` is escaped here, ``body`` by its maker.

    Adversary: a maker of evidence whose texts would reorder what a person reads (bidi).
    """
    return visible(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table that scrolls sideways on a phone. Cells are HTML; ``numbers``: columns of them."""

    def cell(tag: str, index: int, content: str) -> str:
        kind = ' class="n"' if index in numbers else ""
        return f"<{tag}{kind}>{content}</{tag}>"

    def row(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, i, c) for i, c in enumerate(cells))}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="wide"><table>{row("th", head)}{body}</table></div>'


def step_plot(points: Sequence[tuple[int, float | None]], limit: float, what: str) -> str:
    """A quantity that grows in steps, and its limit as a dashed line.

    Args:
        points: (x, y) with x = 1, 2, …; y None where it is not known.
        what: label of the x axis; escaped here.
    """
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return ""
    top = max(limit, *(y for _, y in known)) * 1.1
    count = len(points)

    def place(x: float, y: float) -> str:
        across = _LEFT + (_WIDTH - _LEFT - 10) * x / count
        return f"{across:.1f},{_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - 10) * y / top:.1f}"

    path = [place(0, 0)]
    last = 0.0
    for x, y in known:
        path += [place(x - 1, last), place(x - 1, y), place(x, y)]
        last = y
    start, end = place(0, limit), place(count, limit)
    label = escape(what, quote=True)
    return (
        f'<div class="wide"><svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-label="Cumulative ε by {label}, budget {limit:g}">'
        f'<polyline points="{place(0, top)} {place(0, 0)} {place(count, 0)}" fill="none" '
        'stroke="var(--soft)"/>'
        f'<polyline points="{start} {end}" stroke="var(--red)" stroke-dasharray="5 4" '
        'fill="none"/>'
        f'<polyline points="{" ".join(path)}" fill="none" stroke="var(--blue)" stroke-width="2"/>'
        f'<text x="2" y="{float(start.split(",")[1]) + 4:.0f}">ε = {limit:g}</text>'
        f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 8:.0f}">{label}</text></svg></div>'
    )
