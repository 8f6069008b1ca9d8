"""Does `forcetune doctor` name what is wrong? Faults planted into rMD17, and clean published files.

    python benchmarks/doctor_faults.py --data DATA [--molecules aspirin,uracil] [--only NAME] [--json FILE]

DATA has the folders ``rmd17``, ``acac`` and ``3bpa``. Every fault is planted into the 100 ``train`` frames of a
molecule (some into its ``test`` frames, of which 100 are taken), written to a file as a user would have it, and
examined with the embedded model ``mini``. A fault counts as named when one of its codes is among the findings. The
clean files count what is found without a fault.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write
from ase.units import Bohr, Hartree, kcal, kJ, mol
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import forcetune
from forcetune.backbones.protocol import Backbone

ENERGY, FORCES = "REF_energy", "REF_forces"


@dataclass
class Data:
    """What a fault is planted into: structures with labels, and energies of another molecule."""

    train: list[Atoms]
    test: list[Atoms]
    foreign: list[float]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def each(self, change: Callable[[Atoms], None]) -> None:
        for atoms in self.train:
            change(atoms)

    @property
    def energies(self) -> list[float]:
        return [atoms.info[ENERGY] for atoms in self.train]

    @energies.setter
    def energies(self, values: Sequence[float]) -> None:
        for atoms, value in zip(self.train, values, strict=True):
            atoms.info[ENERGY] = float(value)

    @property
    def forces(self) -> list[np.ndarray]:
        return [atoms.arrays[FORCES] for atoms in self.train]

    @forces.setter
    def forces(self, values: Sequence[np.ndarray]) -> None:
        for atoms, value in zip(self.train, values, strict=True):
            atoms.arrays[FORCES] = np.array(value)


@dataclass(frozen=True)
class Fault:
    """A fault: how it is planted, which findings name it, and how severe the finding must be."""

    name: str
    codes: tuple[str, ...]
    plant: Callable[[Data], None]
    severity: str = "error"
    spoil: Callable[[str], str] | None = None


def scaled(energy: float = 1.0, forces: float = 1.0, positions: float = 1.0) -> Callable[[Data], None]:
    """Labels or positions times a factor, as another unit makes them."""

    def plant(data: Data) -> None:
        data.energies = [energy * e for e in data.energies]
        data.forces = [forces * f for f in data.forces]
        if positions != 1.0:
            for atoms in [*data.train, *data.test]:
                atoms.set_cell(atoms.cell * positions, scale_atoms=False)
                atoms.positions *= positions

    return plant


def energy_per_atom(data: Data) -> None:
    data.energies = [e / len(atoms) for e, atoms in zip(data.energies, data.train, strict=True)]


def shuffled_atoms(data: Data) -> None:
    data.forces = [data.rng.permutation(f) for f in data.forces]


def reordered_atoms(data: Data) -> None:
    order = data.rng.permutation(len(data.train[0]))
    data.forces = [f[order] for f in data.forces]


def previous_frame(data: Data) -> None:
    data.forces = np.roll(np.array(data.forces), 1, axis=0)


def shuffled_frames(data: Data) -> None:
    data.forces = data.rng.permutation(np.array(data.forces))


def shuffled_energies(data: Data) -> None:
    data.energies = data.rng.permutation(data.energies)


def foreign_energies(data: Data) -> None:
    data.energies = data.foreign[: len(data.train)]


def half_foreign(data: Data) -> None:
    half = len(data.train) // 2
    data.energies = data.energies[:half] + data.foreign[half : len(data.train)]


def other_functional(data: Data) -> None:
    """A third of the frames at another level of theory: shifted by 0.1 eV an atom."""
    data.energies = [e + 0.1 * len(data.train[0]) * (k % 3 == 0) for k, e in enumerate(data.energies)]


def permuted_species(data: Data) -> None:
    order = data.rng.permutation(len(data.train[0]))
    data.each(lambda atoms: atoms.set_atomic_numbers(atoms.numbers[order]))


def wrong_species(data: Data) -> None:
    """Every oxygen written as carbon."""
    data.each(lambda atoms: atoms.set_atomic_numbers(np.where(atoms.numbers == 8, 6, atoms.numbers)))


def unknown_element(data: Data) -> None:
    data.train[3].numbers[0] = 14


def some_zero(data: Data) -> None:
    for atoms in data.train[10:15]:
        atoms.arrays[FORCES] *= 0


def fixed_atoms(data: Data) -> None:
    for atoms in data.train:
        atoms.arrays[FORCES][:3] = 0


def lost_component(data: Data) -> None:
    for atoms in data.train:
        atoms.arrays[FORCES][:, 2] = 0


def nan_energy(data: Data) -> None:
    data.train[7].info[ENERGY] = np.nan


def infinite_force(data: Data) -> None:
    data.train[7].arrays[FORCES][2, 1] = np.inf


def overflow(data: Data) -> None:
    data.train[7].arrays[FORCES][2] = (3.4e38, -1e30, 0.0)


def constant_energy(data: Data) -> None:
    data.energies = [data.energies[0]] * len(data.train)


def unusual_keys(data: Data) -> None:
    for atoms in [*data.train, *data.test]:
        atoms.info["E_tot"] = atoms.info.pop(ENERGY)
        atoms.arrays["F_tot"] = atoms.arrays.pop(FORCES)


def half_without_forces(data: Data) -> None:
    for atoms in data.train[::2]:
        del atoms.arrays[FORCES]


def no_cell(data: Data) -> None:
    for atoms in data.train:
        atoms.set_cell(np.zeros((3, 3)))
        atoms.pbc = True


def boxed(length: float) -> Callable[[Data], None]:
    def plant(data: Data) -> None:
        for atoms in data.train:
            atoms.set_cell([length] * 3)
            atoms.pbc = True

    return plant


def flat_cell(data: Data) -> None:
    for atoms in data.train:
        atoms.set_cell([[20, 0, 0], [0, 20, 0], [20, 20, 0]])
        atoms.pbc = True


def rounded(data: Data) -> None:
    data.energies = [round(e, 2) for e in data.energies]


def single_precision(data: Data) -> None:
    data.energies = [float(np.float32(e)) for e in data.energies]


def outlier_energy(data: Data) -> None:
    data.train[40].info[ENERGY] += 2.0


def exploded(data: Data) -> None:
    data.train[40].positions *= 6.0


def overlapping(data: Data) -> None:
    data.train[40].positions[1] = data.train[40].positions[0] + 0.05


def colliding(data: Data) -> None:
    first, second = data.train[40].positions[:2]
    data.train[40].positions[1] = first + 0.6 * (second - first) / np.linalg.norm(second - first)


def one_frame_of_another(data: Data) -> None:
    data.train[40].arrays[FORCES] = data.train[60].arrays[FORCES] + 1e-7


def stale_calculator(data: Data) -> None:
    """Every other frame has the results of the frame before."""
    for one, other in zip(data.train[::2], data.train[1::2], strict=True):
        other.info[ENERGY] = one.info[ENERGY]
        other.arrays[FORCES] = one.arrays[FORCES].copy()


def turned(atoms: Atoms, rng: np.random.Generator, *, forces: bool) -> Atoms:
    """Rotated and shifted at random, with its forces or without them."""
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    found = atoms.copy()
    found.positions = atoms.positions @ rotation + rng.normal(size=3)
    if forces:
        found.arrays[FORCES] = atoms.arrays[FORCES] @ rotation
    return found


def other_orientation(data: Data) -> None:
    data.train = [turned(atoms, data.rng, forces=False) for atoms in data.train]


def exchanged_axes(data: Data) -> None:
    data.forces = [np.roll(f, 1, axis=1) for f in data.forces]


def duplicates(data: Data) -> None:
    data.train[50:60] = [atoms.copy() for atoms in data.train[:10]]


def turned_test_copies(data: Data) -> None:
    """Training frames turned, shifted and with another order of atoms among the test frames."""
    for k in range(10):
        atoms = turned(data.train[k], data.rng, forces=True)
        data.test[k] = atoms[data.rng.permutation(len(atoms))]


def near_test_copies(data: Data) -> None:
    for k in range(10):
        data.test[k] = data.train[k].copy()
        data.test[k].positions += 1e-3 * data.rng.standard_normal(data.test[k].positions.shape)


def trajectory_steps(data: Data) -> None:
    for k in range(1, len(data.train), 2):
        data.train[k] = data.train[k - 1].copy()
        data.train[k].positions += 1e-3 * data.rng.standard_normal(data.train[k].positions.shape)
        data.train[k].info[ENERGY] += 1e-3


def contradicting(data: Data) -> None:
    data.train[20] = data.train[10].copy()
    data.train[20].info[ENERGY] += 0.5


def cut_short(text: str) -> str:
    """In the middle of a line of coordinates; between two frames nobody could see it."""
    lines = text.splitlines()
    return "\n".join([*lines[: int(0.7 * len(lines))], "C  0.1"]) + "\n"


def stars(text: str) -> str:
    """Fortran's way to write a number that does not fit."""
    lines = text.splitlines()
    words = lines[3].split()
    lines[3] = "  ".join([*words[:-1], "********"])
    return "\n".join(lines) + "\n"


def nothing(data: Data) -> None:
    pass


KCAL, KJ = kcal / mol, kJ / mol
LOUD = "warning"
FAULTS = (
    Fault("energies and forces in kcal/mol", ("forces-unit",), scaled(1 / KCAL, 1 / KCAL)),
    Fault("energies alone in kcal/mol", ("energy-unit",), scaled(energy=1 / KCAL)),
    Fault("energies and forces in kJ/mol", ("forces-unit",), scaled(1 / KJ, 1 / KJ)),
    Fault("energies in Hartree", ("energy-unit",), scaled(energy=1 / Hartree)),
    Fault("forces in Hartree/Bohr", ("forces-unit",), scaled(forces=Bohr / Hartree)),
    Fault("Hartree and Hartree/Bohr", ("forces-unit",), scaled(1 / Hartree, Bohr / Hartree)),
    Fault("forces in eV/Bohr", ("forces-unit",), scaled(forces=Bohr), LOUD),
    Fault("forces in meV/Å", ("forces-unit",), scaled(forces=1e3)),
    Fault("energies an atom", ("energy-unit",), energy_per_atom),
    Fault("positions in Bohr", ("positions-bohr",), scaled(positions=1 / Bohr)),
    Fault("positions converted twice", ("positions-bohr",), scaled(positions=Bohr)),
    Fault("positions in nm", ("atoms-overlap", "cell-tiny"), scaled(positions=0.1)),
    Fault("gradients instead of forces", ("forces-sign",), scaled(forces=-1)),
    Fault("gradients in Hartree/Bohr", ("forces-sign",), scaled(1 / Hartree, -Bohr / Hartree)),
    Fault("energies with the wrong sign", ("energy-sign",), scaled(energy=-1)),
    Fault("forces shuffled within frames", ("forces-shuffled",), shuffled_atoms),
    Fault("forces in one wrong order of atoms", ("forces-shuffled",), reordered_atoms),
    Fault("forces of the previous frame", ("forces-of-other-frames",), previous_frame),
    Fault("forces shuffled among frames", ("forces-of-other-frames",), shuffled_frames),
    Fault("one frame with forces of another", ("forces-outlier",), one_frame_of_another, LOUD),
    Fault("results written twice (stale calculator)", ("forces-repeated",), stale_calculator),
    Fault("positions turned, forces not", ("forces-torque",), other_orientation, LOUD),
    Fault("axes of forces exchanged", ("forces-rotated",), exchanged_axes),
    Fault("one component of forces lost", ("forces-torque",), lost_component, LOUD),
    Fault("energies shuffled among frames", ("energy-shuffled",), shuffled_energies),
    Fault("energies of another molecule", ("energy-shuffled",), foreign_energies),
    Fault("energies of another molecule, half", ("energy-levels",), half_foreign, LOUD),
    Fault("a third at another level of theory", ("energy-levels",), other_functional, LOUD),
    Fault("one energy 2 eV off", ("energy-outlier",), outlier_energy, LOUD),
    Fault("energies rounded to 0.01 eV", ("energy-rounded",), rounded, LOUD),
    Fault("energies in single precision", ("energy-rounded",), single_precision, LOUD),
    Fault("constant energies", ("energy-constant",), constant_energy),
    Fault("NaN energy in one frame", ("energy-not-finite",), nan_energy),
    Fault("infinite force in one frame", ("forces-not-finite",), infinite_force),
    Fault("overflow of one force", ("forces-overflow",), overflow),
    Fault("a number written as ****", ("file-unreadable",), nothing, spoil=stars),
    Fault("forces zero everywhere", ("forces-zero",), scaled(forces=0)),
    Fault("forces zero in five frames", ("forces-zero",), some_zero, LOUD),
    Fault("forces of constrained atoms zeroed", ("forces-of-fixed-atoms",), fixed_atoms, LOUD),
    Fault("unusual label keys", ("energy-missing",), unusual_keys),
    Fault("half of the frames without forces", ("forces-missing",), half_without_forces, "warning"),
    Fault("species in another order", ("structures-implausible", "forces-unrelated"), permuted_species, LOUD),
    Fault("oxygen written as carbon", ("atoms-unknown-to-model", "element-unknown-to-model"), wrong_species, LOUD),
    Fault("element unknown to the model", ("element-unknown",), unknown_element),
    Fault("pbc without a cell", ("cell-missing",), no_cell),
    Fault("cell in nm", ("cell-tiny",), boxed(2.0)),
    Fault("cell of 5 Å around the molecule", ("atoms-overlap", "atoms-too-near", "forces-unrelated"), boxed(5.0), LOUD),
    Fault("cell without volume", ("cell-singular",), flat_cell),
    Fault("one exploded frame", ("atom-alone",), exploded, LOUD),
    Fault("one frame with an atom twice", ("atoms-overlap",), overlapping),
    Fault("one frame with a collision", ("atoms-too-near", "forces-outlier"), colliding, LOUD),
    Fault("ten frames twice", ("duplicate-frames",), duplicates, LOUD),
    Fault("one structure, two energies", ("duplicate-labels-differ",), contradicting, LOUD),
    Fault("neighbouring steps of a trajectory", ("near-duplicate-frames",), trajectory_steps, LOUD),
    Fault("training frames turned among test frames", ("test-in-train",), turned_test_copies, LOUD),
    Fault("training frames shaken among test frames", ("test-near-train",), near_test_copies, LOUD),
    Fault("file cut short", ("file-unreadable",), nothing, spoil=cut_short),
)


def examined(data: Data, fault: Fault, model: Backbone, folder: Path) -> forcetune.Checkup:
    """Plant a fault, write the files and examine them."""
    fault.plant(data)
    for name, frames in (("train", data.train), ("test", data.test)):
        write(folder / f"{name}.xyz", frames, format="extxyz")
    if fault.spoil is not None:
        path = folder / "train.xyz"
        path.write_text(fault.spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    quiet = Console(quiet=True)
    return forcetune.doctor(folder / "train.xyz", test=folder / "test.xyz", model=model, console=quiet)


def is_named(fault: Fault, found: forcetune.Checkup) -> bool:
    """Whether one of the fault's codes was found, as severe as it should be."""
    severe = ("error",) if fault.severity == "error" else ("error", "warning")
    return any(item.code in fault.codes and item.severity in severe for item in found.findings)


def plain(frames: Sequence[Atoms]) -> list[Atoms]:
    """Copies whose labels stand under the keys that faults change."""
    found = []
    for atoms in frames:
        own = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        results = {} if atoms.calc is None else atoms.calc.results
        own.info[ENERGY] = float(atoms.info.get(ENERGY, results.get("energy")))
        own.arrays[FORCES] = np.array(atoms.arrays.get(FORCES, results.get("forces")), dtype=np.float64)
        found.append(own)
    return found


def loaded() -> Backbone:
    return forcetune.load("mini")


def run_faults(data: Path, molecule: str, only: str | None) -> list[dict[str, Any]]:
    model = loaded()
    folder = data / "rmd17" / molecule
    other = "ethanol" if molecule != "ethanol" else "aspirin"
    foreign = [atoms.info[ENERGY] for atoms in plain(_all(data / "rmd17" / other / "train.xyz"))]
    train, test = plain(_all(folder / "train.xyz")), plain(_all(folder / "test.xyz", ":100"))
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    chosen = [fault for fault in FAULTS if only is None or only in fault.name]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(molecule, total=len(chosen))
        for fault in chosen:
            with tempfile.TemporaryDirectory() as place:
                given = Data(plain(train), plain(test), foreign)
                found = examined(given, fault, model, Path(place))
            loud = {item.code: item.severity for item in reversed(found.findings) if item.severity != "note"}
            named = is_named(fault, found)
            rows.append({"molecule": molecule, "fault": fault.name, "named": named, "found": loud})
            bar.advance(task)
    return rows


def _all(path: Path, index: str = ":") -> list[Atoms]:
    found = read(path, index)
    assert isinstance(found, list)
    return found


def clean_sets(data: Path) -> list[tuple[str, list[Path], list[Path]]]:
    """Name, training and test files of every published set."""
    acac, bpa = data / "acac", data / "3bpa"
    tests = sorted(acac.glob("test_*.xyz"))
    sets = [
        (f"rmd17/{folder.name}", [folder / "train.xyz"], [folder / "test.xyz"])
        for folder in sorted((data / "rmd17").iterdir())
        if folder.is_dir()
    ]
    sets += [
        ("acac 300 K", [acac / "train_300K.xyz", acac / "isolated_atoms.xyz"], tests),
        ("acac 600 K", [acac / "train_600K.xyz"], tests),
        ("3bpa 300 K", [bpa / "train_300K.xyz", bpa / "iso_atoms.xyz"], [bpa / "train_mixedT.xyz"]),
        ("3bpa mixed T", [bpa / "train_mixedT.xyz"], []),
    ]
    return sets


def run_clean(data: Path) -> list[dict[str, Any]]:
    model = loaded()
    rows = []
    for name, train, test in clean_sets(data):
        found = forcetune.doctor(train, test=test or None, model=model, console=Console(quiet=True))
        counts = {s: sum(item.severity == s for item in found.findings) for s in ("error", "warning", "note")}
        loud = [{"code": i.code, "severity": i.severity, "frames": i.n_frames} for i in found.findings]
        rows.append({"set": name} | counts | {"found": loud})
    return rows


def show(faults: Sequence[dict[str, Any]], clean: Sequence[dict[str, Any]]) -> None:
    molecules = list(dict.fromkeys(row["molecule"] for row in faults))
    table = Table("fault", *molecules, f"errors and warnings, {molecules[0]}", title="Planted faults")
    for name in dict.fromkeys(row["fault"] for row in faults):
        rows = [row for row in faults if row["fault"] == name]
        found = ", ".join(f"{code} ({severity})" for code, severity in rows[0]["found"].items())
        table.add_row(name, *("yes" if row["named"] else "[red]no[/]" for row in rows), found)
    Console().print(table)
    for molecule in molecules:
        named = [row["named"] for row in faults if row["molecule"] == molecule]
        Console().print(f"{molecule}: named {sum(named)} of {len(named)} faults")
    if not clean:
        return
    table = Table("clean set", "errors", "warnings", "notes", "errors and warnings, frames", title="Clean sets")
    for row in clean:
        found = ", ".join(f"{item['code']} ({item['frames']})" for item in row["found"] if item["severity"] != "note")
        table.add_row(row["set"], *(str(row[name]) for name in ("error", "warning", "note")), found)
    Console().print(table)
    errors, warnings = (sum(row[name] for row in clean) for name in ("error", "warning"))
    Console().print(f"clean: {errors} errors, {warnings} warnings in {len(clean)} sets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with rmd17, acac and 3bpa in it")
    parser.add_argument(
        "--molecules", type=lambda text: text.split(","), default=["aspirin"], help="of rMD17, to plant faults into"
    )
    parser.add_argument("--only", help="only faults with this in their name, and no clean sets")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    arguments = parser.parse_args()
    faults = [row for name in arguments.molecules for row in run_faults(arguments.data, name, arguments.only)]
    clean = [] if arguments.only else run_clean(arguments.data)
    show(faults, clean)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"faults": faults, "clean": clean}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
