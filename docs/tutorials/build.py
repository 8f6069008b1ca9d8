"""Execute the tutorials: from NAME.py (percent format) to NAME.ipynb with its outputs, and NAME.md with pictures.

    python docs/tutorials/build.py [NAME …]

It needs forcetune, jupytext, nbconvert and ipykernel. Runs land in a temporary folder. What programs say about their
progress (standard error) is left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).parent
LARGEST = 300_000
"""Bytes of a notebook with its pictures."""


def execute(name: str) -> None:
    """Run one tutorial and write what comes of it."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    clean(notebook)
    write(name, notebook)


def write(name: str, notebook: Any) -> None:
    """Write an executed notebook, and its page with pictures.

    Raises:
        SystemExit: it is too large.
    """
    text = nbformat.writes(notebook) + "\n"
    if len(text) > LARGEST:
        raise SystemExit(f"{name}: {len(text)} bytes with pictures; make them smaller")
    (FOLDER / f"{name}.ipynb").write_text(text, encoding="utf-8")
    body, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"output_files_dir": f"{name}_files", "unique_key": name}
    )
    pictures = FOLDER / f"{name}_files"
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink()
    for path, content in resources["outputs"].items():
        (FOLDER / path).write_bytes(content)
    body = body.replace("![png](", "![The figure that the code above draws](")
    lines = [line.rstrip() for line in body.splitlines()]
    note = f"\nExecuted by `docs/tutorials/build.py`; the notebook is [{name}.ipynb]({name}.ipynb).\n"
    (FOLDER / f"{name}.md").write_text("\n".join(lines).strip() + "\n" + note, encoding="utf-8")


def clean(notebook: Any) -> None:
    """Leave out progress, counters and times that change from one execution to the next."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.metadata = {}
        cell["id"] = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = join_prints([output for output in cell.outputs if not is_progress(output)])
            for output in cell.outputs:
                output.pop("metadata", None)
                if output.output_type in ("display_data", "execute_result"):
                    output["metadata"] = {}


def join_prints(outputs: list[Any]) -> list[Any]:
    """What is printed before and after a line of progress is one text on the page."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1]["text"] += output.text
        else:
            joined.append(output)
    return joined


def is_progress(output: Any) -> bool:
    """Whether an output is a line about progress: on standard error, or what rich shows of it in a notebook."""
    shown = output.get("data", {})
    return output.get("name") == "stderr" or ("text/html" in shown and "image/png" not in shown)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "build"):
        execute(wanted)
