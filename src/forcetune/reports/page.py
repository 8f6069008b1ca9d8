"""Pages from the templates in this folder: each opens offline and can fetch and run nothing."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from forcetune.reports.texts import count_text, number_text, ratio_text

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Whatever a name in the data may hold, a browser runs none of it."""


def render_page(template: str, **context: Any) -> str:
    """A complete HTML document.

    Args:
        template: name of a file in ``templates`` that extends ``page.html``.
        context: what the template shows; every text is escaped, :class:`markupsafe.Markup` (figures) is not.
    """
    return _environment().get_template(template).render(context, policy=POLICY)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read_template),
        autoescape=True,
        undefined=StrictUndefined,  # a name that no page is given is a fault of ours
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number_text, "count": count_text, "ratio": ratio_text}
    return environment


def _read_template(name: str) -> str:
    return files("forcetune.reports").joinpath("templates", name).read_text(encoding="utf-8")
