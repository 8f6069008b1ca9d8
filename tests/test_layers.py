"""A module may import only what stands to the left of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import forcetune

PACKAGE = Path(forcetune.__file__).parent
PROGRAMS = ("lammps", "openmm", "torchsim")
"""Simulation programs: users import `forcetune.torchsim`, which is written in `forcetune.deployment`."""
ROOT = ("__init__", "__main__", "_version", "errors", "irreps", *PROGRAMS)
FOUNDATION = ("_version", "errors", "irreps", "utils", "config")
ORDER = (
    *("frames", "graphs", "kernels", "backbones", "magnetism", "adapters", "evaluation", "uncertainty", "training"),
    # what is written of a run and read again stands below what shows it
    *("runs.results", "runs.learn_results", "runs.predictions", "runs.metrics", "reports", "diagnostics", "deployment"),
    *(*PROGRAMS, "runs", "cli"),
)


def layer_of(module: str) -> str:
    """The layer of a module's name without ``forcetune.``: its room, or itself where it has a place of its own."""
    own = ".".join(module.split(".")[:2])
    return own if own in ORDER else module.split(".")[0]


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return modules


def test_imports_go_one_way() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = layer_of(module)
        if name in ("__init__", "__main__"):
            continue
        assert name in FOUNDATION + ORDER, f"{path}: give the layer a place in the order"
        allowed = set(FOUNDATION) | set(ORDER[: ORDER.index(name) + 1] if name in ORDER else ())
        for imported in imports(path):
            if imported.startswith("forcetune."):
                assert layer_of(imported.removeprefix("forcetune.")) in allowed, f"{path} imports {imported}"


def test_the_root_holds_the_face_only() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ROOT)


def test_model_libraries_are_known_to_their_own_folder_only() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        libraries = {name.split(".")[0] for name in imports(path)} & {"mace", "e3nn", "nequip", "sevenn"}
        home = path.relative_to(PACKAGE).as_posix()
        if libraries:
            allowed = [f"backbones/mace/{name}.py" for name in ("library", "construction", "trusted")]
            # converters run in processes of their own, each with one library
            allowed += [f"deployment/export/workers/{name}_worker.py" for name in ("mace", "sevennet")]
            assert home in allowed, f"{home} imports {libraries}"
            assert len(libraries - {"e3nn"}) <= 1, f"{home} knows {libraries}"


def test_models_are_computed_without_the_libraries() -> None:
    program = (
        "import sys, forcetune\n"
        "from ase.build import molecule\n"
        "atoms = molecule('CH3CH2OH')\n"
        "atoms.calc = forcetune.calculator('mini')\n"
        "assert atoms.get_potential_energy() < -300\n"
        "assert abs(atoms.get_forces()).max() > 0.01\n"
        "assert len(forcetune.load('mini').sites()) > 20\n"
        "print([name for name in ('mace', 'e3nn', 'sevenn', 'nequip', 'lightning') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    for name in forcetune.__all__:
        assert getattr(forcetune, name) is not None
    assert not isinstance(forcetune.fit, type(ast))
