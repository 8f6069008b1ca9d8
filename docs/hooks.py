"""What mkdocs does beside its plugins: tables that are made from the package, and pages without a place.

A line ``<!-- generated: NAME -->`` in a page is replaced by a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.utils import get_relative_url
from pydantic import BaseModel

from forcetune.adapters.methods import METHODS
from forcetune.backbones.registry import LICENCE_NOTES, list_models
from forcetune.config import RunConfig
from forcetune.deployment.export.registry import TARGETS
from forcetune.frames.published import list_datasets

MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def models() -> str:
    rows = [
        [f"`{model.name}`", model.library, model.elements, model.description, model.size, model.licence]
        for model in list_models()
    ]
    return table(["name", "library", "elements", "for, and level of theory", "size", "licence"], rows)


def licences() -> str:
    return "\n".join(f"- **{name}**: {text}." for name, text in LICENCE_NOTES.items())


def methods() -> str:
    rows = []
    for name, build in METHODS.items():
        method = build()
        rows.append(
            [
                f"`{name}`",
                method.description,
                f"{method.learning_rate:g}",
                f"{method.default_rate('soap'):g}",
                method.optimizer,
                "yes" if method.mergeable else "no",
            ]
        )
    return table(["method", "what is trained", "learning rate", "with `soap`", "optimizer", "merges"], rows)


def targets() -> str:
    rows = [
        [f"`{target.name}`", ", ".join(target.libraries), "yes" if target.gates else "no", target.about]
        for target in TARGETS.values()
    ]
    return table(["target", "models", "gates", "what runs it"], rows)


def datasets() -> str:
    rows = [
        [f"`{one.name}`", f"{one.size / 1e9:.1f} GB", one.licence, one.description, f"[page]({one.page})"]
        for one in list_datasets()
    ]
    return table(["name", "size", "licence", "what", "where"], rows)


def options() -> str:
    """A section for each section of the configuration, sections within included."""
    parts = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        rows = _option_rows(name, section)
        summary = (section.__doc__ or "").strip().splitlines()[0]
        parts.append(f"## {name}\n\n{summary}\n\n" + table(["option", "default", "what it does"], rows))
    return "\n\n".join(parts)


def _option_rows(prefix: str, section: type[BaseModel]) -> list[list[str]]:
    rows = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            rows += _option_rows(f"{prefix}.{name}", inner)
            continue
        default = "needed" if field.is_required() else f"`{_default_text(field.default)}`"
        rows.append([f"`{prefix}.{name}`", default, field.description or ""])
    return rows


def _default_text(value: Any) -> str:
    """A default as YAML reads it; words need no quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


GENERATED: dict[str, Callable[[], str]] = {
    "models": models,
    "licences": licences,
    "methods": methods,
    "targets": targets,
    "datasets": datasets,
    "options": options,
}


def on_config(config: Any) -> Any:
    """Add pages that the navigation does not name to its end."""
    folder = Path(config["docs_dir"])
    named: set[str] = set()
    for section in config["nav"]:
        for entries in section.values():
            if isinstance(entries, str):
                named.add(entries)
                continue
            for entry in entries:
                named |= {entry} if isinstance(entry, str) else set(entry.values())
    others = sorted({path.name for path in folder.glob("*.md")} - named)
    if others:
        config["nav"].append({"More": others})
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in generated tables; code of tutorials, which is wide, takes the place of the table of contents."""
    if page.file.src_uri.startswith("tutorials/"):
        page.meta["hide"] = ["toc"]
    return MARKER.sub(lambda match: GENERATED[match[1]](), markdown)


_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):(?=<code>)")
_INLINE_CODE = re.compile(r"(?<!<pre>)(?<!<span></span>)<code>[^<]*--[^<]*</code>")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other objects as Sphinx does; here the name alone is shown. Options stay in one line."""
    html = _ROLE.sub("", html)
    return _INLINE_CODE.sub(lambda code: _OPTION.sub(r'<span class="option">\g<0></span>', code[0]), html)


_SHIM = re.compile(r'<script src="https://unpkg\.com/iframe-worker/shim"></script>')


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The theme fetches from the network what lets the search run in pages opened from a file; here it is a file."""
    place = get_relative_url("assets/search_worker.js", page.url)
    return _SHIM.sub(f'<script src="{place}"></script>', output)


def on_post_template(output: str, **_: Any) -> str:
    """The same for pages that are no document, such as that of a missing address, which are seen on servers only."""
    return _SHIM.sub("", output)
