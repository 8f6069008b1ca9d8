"""Templates: every text is escaped, and whatever is not given to a template is a fault and no hole in the page."""

from __future__ import annotations

from importlib.resources import files

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from forcetune.reports.page import render_page

COMPARISON = {
    "title": "Comparison <of> methods",
    "brand": "Comparison",
    "methods": ["full", "<b>elora</b>"],
    "reason": "a & b",
    "errors_title": "Errors",
    "head": ["method", "E"],
    "rows": [["full", "1.0"], ["<i>", "2.0"]],
    "table_note": "none",
    "curves": [Markup("<svg></svg>")],
    "learning_head": ["method", "exponent"],
    "learning_rows": [],
    "learning_plots": [],
    "parity": [],
    "runs": [('"full"-1', "full, seed 1")],
    "footer": "the end",
}


def test_texts_are_escaped_and_figures_are_not() -> None:
    page = render_page("comparison.html", **COMPARISON)
    assert "Comparison &lt;of&gt; methods · forcetune" in page
    assert "full · &lt;b&gt;elora&lt;/b&gt;" in page and "<p>a &amp; b</p>" in page
    assert '<th scope="row">&lt;i&gt;</th><td class="n">2.0</td>' in page
    assert '<a href="&#34;full&#34;-1/report.html">' in page
    assert "<figure><svg></svg></figure>" in page


def test_sections_without_content_are_left_out() -> None:
    page = render_page("comparison.html", **COMPARISON)
    assert '<section id="curves">' in page and '<a href="#curves">' in page
    assert 'id="frames"' not in page and 'id="parity"' not in page and "#parity" not in page.partition("</style>")[2]


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="reason"):
        render_page("comparison.html", **{name: value for name, value in COMPARISON.items() if name != "reason"})


def test_no_template_switches_escaping_off() -> None:
    for template in files("forcetune.reports").joinpath("templates").iterdir():
        text = template.read_text(encoding="utf-8")
        assert "|safe" not in text and "autoescape" not in text, template.name
