"""What is shipped: the wheel and the source distribution, what they hold, and that the wheel runs by itself."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import forcetune

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "forcetune"
NEEDED = (
    "py.typed",
    "backbones/mini/mini.safetensors",
    "frames/aminoethanol/train.xyz.gz",
    "frames/aminoethanol/hot.xyz.gz",
    "reports/templates/run.html",
    "reports/templates/page.css",
)
MOST_BYTES = 20_000_000


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, made from the source distribution, and that."""
    hatchling = pytest.importorskip("hatchling.build", reason="pip install hatchling")
    assert hatchling is not None
    folder = tmp_path_factory.mktemp("dist")
    program = (
        "import sys, tarfile, os\n"
        "from hatchling.build import build_sdist, build_wheel\n"
        "name = build_sdist(sys.argv[1])\n"
        "with tarfile.open(os.path.join(sys.argv[1], name)) as archive:\n"
        "    archive.extractall(sys.argv[1], filter='data')\n"
        "os.chdir(os.path.join(sys.argv[1], name.removesuffix('.tar.gz')))\n"
        "build_wheel(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"forcetune", f"forcetune-{forcetune.__version__}.dist-info"}
    inside = {name.removeprefix("forcetune/") for name in names if name.startswith("forcetune/")}
    assert set(NEEDED) <= inside
    # all that stands in the sources, caches aside
    sources = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert inside == {name for name in sources if "__pycache__" not in name}
    assert not any(re.search(r"(^|/)(tests?|test_\w+\.py|conftest\.py)(/|$)", name) for name in names)
    assert wheel.stat().st_size < MOST_BYTES
    assert "Requires-Python: <3.14,>=3.11" in metadata
    assert "License-Expression: MIT" in metadata
    for extra in ("hub", "wandb", "mlflow", "docs", "mace", "sevennet"):
        assert f"Provides-Extra: {extra}" in metadata


def test_the_source_distribution_can_be_tested_and_has_no_results(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "src/forcetune/py.typed", "tests/conftest.py"} <= names
    for name in names:
        assert not name.startswith(("site/", "runs/", ".venv", "shared/")), name
        assert not name.endswith((".model", ".pyc", ".ckpt", ".pth")), name


def test_the_conda_recipe_asks_for_what_the_package_needs(project: dict[str, Any]) -> None:
    text = (ROOT / "recipe" / "meta.yaml").read_text(encoding="utf-8")
    version = re.search(r'set version = "([^"]+)"', text)
    assert version is not None and version[1] == forcetune.__version__
    lines = [line for line in text.splitlines() if "{%" not in line]
    recipe = yaml.safe_load(re.sub(r"\{\{.*?\}\}", "x", "\n".join(lines)))
    conda = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    asked = dict(requirement.split(" ", 1) for requirement in recipe["requirements"]["run"])
    assert asked.pop("python") == project["requires-python"]
    expected = {}
    for requirement in project["dependencies"]:
        match = re.match(r"([a-z0-9-]+)([^;]*)", requirement)
        assert match is not None
        expected[conda.get(match[1], match[1])] = match[2].strip()
    assert asked == expected
    assert recipe["build"]["entry_points"] == [f"forcetune = {project['scripts']['forcetune']}"]


def test_versions_of_python_are_the_same_everywhere(project: dict[str, Any]) -> None:
    numbers = [text.rsplit(" ", 1)[1] for text in project["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert project["requires-python"] == f">={numbers[0]},<3.{int(numbers[-1].split('.')[1]) + 1}"


@pytest.mark.slow
def test_the_wheel_starts_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    """As `pipx run` does it; the packages that it needs are those that are installed here."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    scripts = home / ("Scripts" if sys.platform == "win32" else "bin")
    python = scripts / ("python.exe" if sys.platform == "win32" else "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[0]], check=True)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = subprocess.run([python, "-c", purelib], check=True, capture_output=True, text=True).stdout.strip()
    # the installed packages follow, but not an editable install of this checkout
    others = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (Path(place) / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    environment = {"PATH": str(scripts), "FORCETUNE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}

    def start(*command: str | Path) -> str:
        run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert run.returncode == 0, run.stderr[-2000:]
        return run.stdout

    program = scripts / "forcetune"
    assert start(program, "--version").strip() == f"forcetune {forcetune.__version__}"
    assert str(home) in start(python, "-c", "import forcetune; print(forcetune.__file__)")
    short = ("--picoseconds", "0.01", "--set", "training.epochs=2", "--set", "output.forgetting=false")
    assert "Frames never trained on" in start(program, "demo", *short)
    assert (tmp_path / "demo" / "report.html").is_file()
