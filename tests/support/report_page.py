"""What a reader of a report's page finds in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from securefedcollm_audits.report.report import make_report


class Reader(HTMLParser):
    """Anchors, links and text of a page that closes what it opens."""

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.ids, self.words = [], [], [], []
        self.feed(page)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def results_of(bundle, path, **changes):
    """A ``results.json`` as the run with this bundle would have left it."""
    _, case = make_report(bundle)
    scores = [{"slm/easy": 0.5, "slm/<hard>": 0.3}, {"slm/easy": 0.75, "slm/<hard>": 0.25}]
    path.write_text(
        json.dumps(
            {
                "digest": case.digest.hex(),
                "run_id": case.run.hex(),
                "rounds": [{"evaluation": s | {"llm/easy": 1.0}} for s in scores],
                "table": [
                    {
                        "model": "slm",
                        "method": "zero-shot",
                        "accuracy": {"easy": 0.4, "<hard>": 0.2},
                    },
                    {"model": "slm", "method": "FedAvg", "accuracy": {"easy": 0.7}},
                ],
            }
            | changes
        )
    )
    return path
