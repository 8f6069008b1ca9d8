"""The frame of every page we write: it opens offline and can fetch and run nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from forcetune.reports.tables import Html, html

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Whatever a name in the data may hold, a browser runs none of it."""


def page(title: str, header: Html, sections: Sequence[tuple[str, str, Html]], *, footer: str = "") -> str:
    """A complete HTML document.

    Args:
        title: of the window.
        header: the page's head, complete.
        sections: key (the link's anchor), heading and content of each; those without content are left out.
        footer: a sentence at the end.
    """
    css = files("forcetune.reports").joinpath("report.css").read_text(encoding="utf-8")
    shown = [(key, html(name), text) for key, name, text in sections if text]
    body = "\n".join(f'<section id="{key}">\n<h2>{name}</h2>\n{text}\n</section>' for key, name, text in shown)
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in shown)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html(title)} · forcetune</title>
<style>
{css}</style>
</head>
<body>
<main>
{header}
<nav>{links}</nav>
{body}
<footer>{html(footer)}</footer>
</main>
</body>
</html>
"""
