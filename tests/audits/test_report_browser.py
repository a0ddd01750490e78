"""The report in a browser: it renders, asks nobody for anything, and fits a phone and a printer."""

from __future__ import annotations

import re

import pytest
from securefedcollm_audits.report.page import to_html
from securefedcollm_audits.report.report import make_report

from tests.support import browser

pytestmark = pytest.mark.skipif(browser.BINARY is None, reason=browser.WHY_NOT)

PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def page(audited_bundle):
    return to_html(*make_report(audited_bundle))


def test_it_renders_at_every_width_without_errors_or_requests(page, tmp_path):
    seen, console = browser.look(page, tmp_path, (PHONE, DESKTOP))
    assert console == []
    phone, desktop = seen
    for view, width in ((phone, PHONE), (desktop, DESKTOP)):
        assert view["fetched"] == []
        assert width - 20 <= view["width"] <= width
        assert view["needed"] <= view["width"]  # tables scroll by themselves, the page does not
        assert view["text"] > 5000
        assert len(view["plots"]) >= 3
        assert all(height > 30 for height in view["plots"])
    assert phone["height"] > desktop["height"]


def test_it_prints(page, tmp_path):
    pdf = browser.print_pdf(page, tmp_path)
    assert pdf.startswith(b"%PDF-")
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 4 <= pages <= 30


def test_a_page_that_fetches_fails_or_is_too_wide_is_noticed(page, tmp_path):
    """The measurement itself: each fault that it looks for, put in on purpose."""
    bad = (
        "<!doctype html><script>missing()</script><style>div { width: 2000px }</style>"
        '<div>x</div><img src="http://nowhere.invalid/x.png">'
    )
    (view,), console = browser.look(bad, tmp_path, (PHONE,))
    assert any("missing is not defined" in line for line in console)
    assert view["needed"] >= 2000
    assert view["fetched"] == ["http://nowhere.invalid/x.png"]
