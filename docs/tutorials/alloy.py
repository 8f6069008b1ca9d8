# %% [markdown]
# # An alloy with `sevennet-0`
#
# SevenNet-0 knows 89 elements and stress. It is free (MIT) and comes in the wheel of `sevenn`, of which only the files
# are wanted here: `pip install --no-deps sevenn==0.13.0`.
#
# So that everyone can repeat this page without a DFT code and without a download of gigabytes, the labels are those of
# a larger model: `sevennet-l3i5`, in the same wheel, plays the part of DFT. What is measured is therefore how well a
# small fast model learns a slow one on one alloy. With frames of your own, everything below stays the same.

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

import forcetune

warnings.simplefilter("ignore")
plt.rcParams |= {"figure.dpi": 80, "figure.figsize": (6.4, 3.0), "axes.spines.top": False, "axes.spines.right": False}

# %% [markdown]
# ## Frames
#
# Four atoms of copper and gold on a face-centred lattice, in any composition, cells strained by some percent and atoms
# displaced: 24 to train on, 8 to validate on, 16 to test.

# %%
teacher = forcetune.calculator("sevennet-l3i5", dtype="float32")
generator = np.random.default_rng(7)


def frame():
    atoms = bulk("Cu", "fcc", a=3.85 + 0.1 * generator.normal(), cubic=True)
    atoms.symbols = generator.choice(["Cu", "Au"], size=len(atoms))
    strain = np.eye(3) + 0.03 * generator.normal(size=(3, 3))
    atoms.set_cell(atoms.cell @ (strain + strain.T) / 2, scale_atoms=True)
    atoms.rattle(0.12, rng=generator)
    atoms.calc = teacher
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


frames = [frame() for _ in range(48)]
for name, part in (("train", frames[:24]), ("valid", frames[24:32]), ("test", frames[32:])):
    write(f"{name}.xyz", part)
print(sorted({atoms.get_chemical_formula() for atoms in frames}))

# %% [markdown]
# ## Fit
#
# `elora` trains low-rank updates on every path and merges into a plain checkpoint. Stress labels are there, so stress
# is trained on without being asked for. Energies of such small cells count little beside so many forces, hence their
# weight.

# %%
run = forcetune.fit(
    "train.xyz",
    model="sevennet-0",
    method="elora",
    valid="valid.xyz",
    test="test.xyz",
    epochs=30,
    out="run",
    settings={
        "training.loss.energy": 100.0,
        "training.schedule.name": "cosine",
        "training.batch_size": 4,
        "model.dtype": "float32",
        "output.forgetting": False,
    },
)
before, after = run.before["test"], run.after["test"]
for label, unit, key in (
    ("energy", "meV/atom", "energy_mae_mev_per_atom"),
    ("forces", "meV/Å", "forces_mae_mev_per_ang"),
    ("stress", "meV/Å³", "stress_mae_mev_per_ang3"),
):
    print(f"test {label}: {getattr(before, key):6.2f} → {getattr(after, key):6.2f} {unit}")

# %% [markdown]
# ## A curve that was not trained on
#
# Energy against volume of ordered CuAu, by the teacher, the untouched model and the tuned one, each from its own
# minimum. The steps of the grid are 0.05 Å, and "lowest at" is no finer than that.

# %%
cell = bulk("Cu", "fcc", a=3.9, cubic=True)
cell.symbols = ["Cu", "Cu", "Au", "Au"]
lengths = np.linspace(3.6, 4.25, 14)
figure, axis = plt.subplots()
curves = {"sevennet-l3i5 (labels)": teacher}
curves |= {"sevennet-0": forcetune.calculator("sevennet-0"), "tuned": forcetune.calculator("run")}
styles = ({"color": "0.6", "linewidth": 4}, {"color": "#b04a00", "linestyle": "--"}, {"color": "#0b6e4f"})
for (name, calculator), style in zip(curves.items(), styles, strict=True):
    energies = []
    for length in lengths:
        atoms = cell.copy()
        atoms.set_cell([length] * 3, scale_atoms=True)
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy() / len(atoms))
    energies = np.array(energies)
    axis.plot(lengths, 1000 * (energies - energies.min()), label=name, **style)
    print(f"{name:22} lowest at {lengths[energies.argmin()]:.2f} Å")
axis.set(xlabel="lattice constant, Å", ylabel="energy, meV/atom")
axis.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## A checkpoint for everyone else
#
# The merged file is the original checkpoint with other numbers in it: `SevenNetCalculator`, `sevenn get_model` and
# LAMMPS open it. It is compared with base + adapter before it takes its place.

# %%
merged = forcetune.merge("run", "tuned.pth")
print(f"{merged.path.name}: differs by at most {merged.forces_difference:.0e} in forces (relative)")
