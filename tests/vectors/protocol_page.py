"""Keep the generated parts of ``docs/protocol.md``: ``python -m tests.vectors.protocol_page``."""

from __future__ import annotations

import re
from pathlib import Path

from securefedcollm.aggregation.masking import messages
from securefedcollm.aggregation.masking.graph import messages as graph_messages
from securefedcollm.aggregation.messages import Ask
from securefedcollm.aggregation.steps import GRAPH_TRANSITIONS, TRANSITIONS, Step, Transition

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
_PART = re.compile(r"(<!-- generated: (\w+) .*?-->\n).*?(<!-- end -->)", re.DOTALL)


def transitions(table: dict[Step, Transition] = TRANSITIONS, letter: str = "R") -> str:
    """The table of transitions."""
    rows = [
        "| step | state | is asked | answers | and is then in |",
        "| --- | --- | --- | --- | --- |",
    ]
    for number, (step, transition) in enumerate(table.items()):
        request, reply = transition.request.lower(), transition.reply.lower()
        words = (step.value, request, reply, transition.following.value)
        rows.append(f"| {letter}{number} | {' | '.join(f'`{word}`' for word in words)} |")
    return "\n".join(rows) + "\n"


def layouts() -> str:
    """Tag, fields and greatest size of every msgpack message."""
    rows = ["| tag | fields | limit, bytes |", "| --- | --- | --- |"]
    inner = {messages.Parcel, messages.Statement}
    for kind in (Ask, *vars(messages).values()):
        if isinstance(kind, type) and issubclass(kind, messages.Message):
            tag = kind.__struct_config__.tag
            if tag:
                limit = "inside others" if kind in inner else str(kind.LIMIT)
                rows.append(f"| `{tag}` | {', '.join(kind.__struct_fields__)} | {limit} |")
    return "\n".join(rows) + "\n"


def graph_layouts() -> str:
    """The same of the messages on a graph."""
    rows = ["| tag | fields | limit, bytes |", "| --- | --- | --- |"]
    for kind in vars(graph_messages).values():
        fields = ", ".join(getattr(kind, "__struct_fields__", ()))
        if not fields or kind.__module__ != graph_messages.__name__:
            continue
        if issubclass(kind, graph_messages.Record):
            rows.append(f"| none: a {kind.__name__.lower()} | {fields} | inside others |")
        else:
            rows.append(f"| `{kind.__struct_config__.tag}` | {fields} | {kind.LIMIT} |")
    return "\n".join(rows) + "\n"


def render(page: str) -> str:
    """``page`` with its generated parts made anew."""
    parts = {"transitions": transitions, "messages": layouts}
    parts["graph_transitions"] = lambda: transitions(GRAPH_TRANSITIONS, "G")
    parts["graph_messages"] = graph_layouts
    return _PART.sub(lambda match: f"{match[1]}{parts[match[2]]()}{match[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
