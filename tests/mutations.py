"""Whether the tests notice faults: each of these is put into a copy of the package and the nearest tests run on it.

    python tests/mutations.py [--only WORD] [--list] [--json FILE]

A fault is a sign, a factor, a slice or a step that is left out, in the networks, the kernels or the adapters. It is
caught where a test fails. The checkout itself is never changed. The exit code is 1 where a fault goes unnoticed, and 2
where the text that a fault replaces is no longer there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "tests/backbones/mace/test_network.py"
SURGERY = "tests/backbones/mace/test_surgery.py"
LAYERS = "tests/kernels/test_equivariant_layers.py"
RADIAL = "tests/kernels/test_compiled_radial.py"


@dataclass(frozen=True, slots=True)
class Fault:
    """One deliberate fault.

    Attributes:
        name: what is wrong.
        file: below ``src/forcetune``.
        before, after: text that occurs once, and what stands there instead.
        tests: arguments for pytest, the nearest tests.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    caught: bool
    by: str
    seconds: float


FAULTS = (
    # networks
    Fault(
        "the shift of interaction energies is subtracted",
        "backbones/mace/blocks.py",
        "self.scale.reshape(-1)[0] * energies + self.shift",
        "self.scale.reshape(-1)[0] * energies - self.shift",
        (SURGERY, "-k", "one_head_gives and default"),
    ),
    Fault(
        "messages are not divided by the number of neighbours",
        "backbones/mace/blocks.py",
        "message.scaled(1 / self.neighbours)",
        "message.scaled(1.0)",
        (SURGERY, "-k", "one_head_gives and default"),
    ),
    Fault(
        "densities lack their 1",
        "backbones/mace/blocks.py",
        "sum_over_neighbors(step.plan, density) + 1)",
        "sum_over_neighbors(step.plan, density) + 2)",
        (SURGERY, "-k", "one_head_gives and density"),
    ),
    Fault(
        "the residual part of nonlinear interactions is left out",
        "backbones/mace/blocks.py",
        ".scaled(1 / around).plus(rest)",
        ".scaled(1 / around)",
        (SURGERY, "-k", "one_head_gives and nonlinear"),
    ),
    Fault(
        "the second readout reads the first layer",
        "backbones/mace/network.py",
        "outputs[-1 if len(self.readouts) == 1 else index]",
        "outputs[-1 if len(self.readouts) == 1 else 0]",
        (SURGERY, "-k", "one_head_gives and third_order"),
    ),
    Fault(
        "weights of cut elements keep their size",
        "backbones/mace/surgery.py",
        "fewer_elements = math.sqrt(len(keep) / total)",
        "fewer_elements = len(keep) / total",
        (SURGERY, "-k", "fewer_elements and default"),
    ),
    Fault(
        "half of the stress",
        "backbones/network.py",
        "stresses = per_volume((strain + strain.transpose(1, 2)) / 2, batch.cell)\n        if create_graph",
        "stresses = per_volume((strain + strain.transpose(1, 2)) / 4, batch.cell)\n        if create_graph",
        (SURGERY, "-k", "fewer_elements and default"),
    ),
    Fault(
        "forces of the receivers have the wrong sign",
        "backbones/network.py",
        "phase.forces_are_done()\n        forces = pull.new_zeros(plan.n_atoms, 3)"
        ".index_add(0, plan.sender, pull).index_add(0, plan.receiver, -pull)",
        "phase.forces_are_done()\n        forces = pull.new_zeros(plan.n_atoms, 3)"
        ".index_add(0, plan.sender, pull).index_add(0, plan.receiver, pull)",
        (SURGERY, "-k", "fewer_elements and default"),
    ),
    # kernels
    Fault(
        "messages lack √(2 l + 1)",
        "kernels/layers.py",
        "math.sqrt(out.dim) * coupling.transpose(0, 1)",
        "coupling.transpose(0, 1)",
        (LAYERS, "-k", "messages"),
    ),
    Fault(
        "skip connections forget their factor",
        "kernels/linear.py",
        "index_select(1, present).transpose(0, 1) * block.factor",
        "index_select(1, present).transpose(0, 1)",
        (LAYERS, "-k", "for_each_species"),
    ),
    Fault(
        "the envelope's last power is off by one",
        "kernels/radial.py",
        "(power + 1) * (power + 2) / 2, power * (power + 2), power * (power + 1) / 2",
        "(power + 1) * (power + 2) / 2, power * (power + 2), power * (power + 2) / 2",
        (LAYERS, "-k", "radial"),
    ),
    Fault(
        "the whole repulsion of a pair instead of half",
        "kernels/radial.py",
        "return 0.5 * potential * envelope",
        "return potential * envelope",
        (LAYERS, "-k", "radial"),
    ),
    Fault(
        "spherical harmonics lack √2 for m ≠ 0",
        "kernels/harmonics.py",
        "norm *= math.sqrt(2) if m else 1",
        "norm *= 1",
        ("tests/kernels/test_harmonics.py", "-k", "slopes"),
    ),
    Fault(
        "gradients by directions keep their sign on reversed edges",
        "kernels/convolution.py",
        "alpha=-1 if path.odd else 1",
        "alpha=1",
        ("tests/kernels/test_convolution.py",),
    ),
    Fault(
        "second derivatives of messages lack the part of moved features",
        "kernels/convolution.py",
        "factors = [] if still else [(pulled, hx)]",
        "factors = []",
        ("tests/kernels/test_convolution.py",),
    ),
    Fault(
        "a product rule of the contraction has one term",
        "kernels/contraction.py",
        "            sums[second].addcmul_(parts[place], rows[run.first])\n",
        "",
        ("tests/kernels/test_contraction.py",),
    ),
    Fault(
        "the second derivative of a radial network's SiLU has a term less",
        "kernels/compiled/activation_code.py",
        "w.subtract(rest, s), w.constant(2))",
        "w.subtract(rest, s), w.constant(1))",
        (RADIAL,),
    ),
    Fault(
        "gradients by a radial network's weights lack what comes through its activations",
        "kernels/compiled/radial_network.py",
        "_outer_sum((moved[number], by_z[number]), (inputs[number], bent))",
        "_outer_sum((moved[number], by_z[number]))",
        (RADIAL,),
    ),
    Fault(
        "the gradient by a hidden number leaves out the layers behind it",
        "kernels/compiled/activation_code.py",
        "result = w.multiply_add(read(v[0]), read(slope), result)",
        "result = w.multiply(read(v[0]), read(slope))",
        (RADIAL,),
    ),
    Fault(
        "forces make a radial network wait for gradients by its weights",
        "kernels/compiled/radial_network.py",
        "need and will_go_on([edge]) for need, edge in zip(needs, ctx.next_functions, strict=True)",
        "need for need, edge in zip(needs, ctx.next_functions, strict=True)",
        (RADIAL,),
    ),
    Fault(
        "densities of neighbours get no radial features where splines stand for the radial weights",
        "backbones/mace/network.py",
        "if splined is None or any(block.has_density for block in self.interactions):",
        "if splined is None:",
        ("tests/kernels/test_splines.py",),
    ),
    # adapters
    Fault(
        "gains of a fixed gate lack their slope",
        "kernels/fixed_gate.py",
        "[*by_shift, together * kept.slopes]",
        "[*by_shift, together]",
        ("tests/adapters/test_gate.py",),
    ),
    Fault(
        "shifts of the second block of scalars are those of the first",
        "adapters/updates/gate.py",
        "shift = shifts[..., n_shift : n_shift + block.multiplicity]",
        "shift = shifts[..., : block.multiplicity]",
        ("tests/adapters/test_gate.py", "-k", "scalar"),
    ),
    Fault(
        "low-rank updates of contractions are not divided by the couplings",
        "adapters/updates/low_rank.py",
        "self.scales[path.name] = spec.scale / couplings",
        "self.scales[path.name] = spec.scale",
        ("tests/adapters/test_methods.py", "tests/adapters/test_low_rank.py"),
    ),
    Fault(
        "α does not reach low-rank updates",
        "adapters/updates/low_rank.py",
        "return self.alpha / self.rank",
        "return 1.0",
        ("tests/adapters/test_methods.py", "tests/adapters/test_low_rank.py"),
    ),
    Fault(
        "the threshold is added to what remains of a change",
        "adapters/updates/soft_threshold.py",
        "torch.relu(self.change.abs() - delta)",
        "self.change.abs() * (self.change.abs() > delta)",
        ("tests/adapters/test_soft_threshold.py", "-k", "equation"),
    ),
    Fault(
        "detaching leaves tuned reference energies",
        "adapters/attach.py",
        "    backbone.set_reference_energies(adapter.base_references)\n    adapter.base = backbone.base\n",
        "    adapter.base = backbone.base\n",
        ("tests/adapters/test_battery.py", "-k", "fresh_adapter_changes_nothing and elora"),
    ),
    Fault(
        "folding adds a change twice",
        "adapters/attach.py",
        "weight.copy_(part(weight))",
        "weight.copy_(part(part(weight)))",
        ("tests/adapters/test_battery.py", "-k", "merged_weights and elora"),
    ),
)


def copy_of_checkout(folder: Path) -> None:
    """What the tests need, without anything built."""
    ignored = shutil.ignore_patterns("__pycache__", ".pytest_cache", "*.pyc")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy2(ROOT / "pyproject.toml", folder)


def check(fault: Fault, folder: Path) -> Outcome:
    """Put a fault into the copy, run its tests, and take it out again.

    Raises:
        ValueError: the text that it replaces does not occur exactly once.
    """
    file = folder / "src" / "forcetune" / fault.file
    intact = file.read_text(encoding="utf-8")
    if intact.count(fault.before) != 1:
        raise ValueError(f"{fault.name}: its text occurs {intact.count(fault.before)} times in {fault.file}")
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *fault.tests]
    start = time.perf_counter()
    try:
        file.write_text(intact.replace(fault.before, fault.after), encoding="utf-8")
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(intact, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise ValueError(f"{fault.name}: its tests cannot be run: {(done.stdout + done.stderr)[-1000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    by = failed[0].removeprefix("FAILED ").split(" - ")[0] if failed else ""
    return Outcome(fault.name, done.returncode == 1, by, time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description="put deliberate faults into a copy of the package and run tests on it")
    parser.add_argument("--only", default="", help="faults with this word in their name or file")
    parser.add_argument("--list", action="store_true", help="name them only")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if arguments.only in fault.name or arguments.only in fault.file]
    if arguments.list:
        for fault in chosen:
            print(f"{fault.file}: {fault.name}")
        return 0
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        copy_of_checkout(Path(scratch))
        for fault in chosen:
            try:
                outcome = check(fault, Path(scratch))
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            outcomes.append(outcome)
            verdict = f"caught by {outcome.by}" if outcome.caught else "NOT CAUGHT"
            print(f"{fault.file}: {fault.name}: {verdict} ({outcome.seconds:.0f} s)", flush=True)
    caught = sum(outcome.caught for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} caught")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(caught < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
