# %% [markdown]
# # Liquid water with `sevennet-0`
#
# From one box of water to a potential of another functional: sample the liquid with the foundation model, label the
# frames with the better method, fit, and look at what a liquid hangs on: the forces *between* molecules, the pressure,
# and the hydrogen bond.
#
# So that everyone can repeat this page without a DFT code, a model plays the part of r²SCAN: the modality `R2SCAN` of
# `sevennet-mf-0`. It comes with `sevennet-0` (PBE) in the wheel of `sevenn`, of which only the files are wanted:
# `pip install --no-deps sevenn==0.13.0`. What is measured is therefore how well one model learns another, and not how
# good either is for water. With a DFT code, its calculator takes the place of `teacher`; everything else stays.

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

import forcetune

warnings.simplefilter("ignore")
plt.rcParams |= {"figure.dpi": 80, "figure.figsize": (6.4, 3.0), "axes.spines.top": False, "axes.spines.right": False}
green, orange = "#0b6e4f", "#b04a00"
generator = np.random.default_rng(3)

# %% [markdown]
# ## Sample
#
# Sixteen molecules at 1 g/cm³ start on a body-centred lattice, turned at random, and are relaxed a little. Then the
# foundation model moves them at 350 K. Hydrogen has the mass of deuterium, which allows a step of 1 fs and changes no
# energy. The first 60 steps melt the lattice and are thrown away; of the next 270 every 9th is a frame.

# %%
student = forcetune.calculator("sevennet-0")
length = (16 * 29.9) ** (1 / 3)
box = Atoms(cell=[length] * 3, pbc=True)
for site in np.ndindex(2, 2, 2):
    for offset in (0.25, 0.75):
        one = molecule("H2O")
        one.euler_rotate(*generator.uniform(0, 360, 3), center="COM")
        one.translate((np.array(site) + offset) * length / 2 - one.get_center_of_mass())
        box += one
box.set_masses([2.014 if symbol == "H" else mass for symbol, mass in zip(box.symbols, box.get_masses(), strict=True)])
box.calc = student
FIRE(box, logfile=None).run(fmax=0.5, steps=20)
MaxwellBoltzmannDistribution(box, temperature_K=350, rng=generator)
dynamics = Langevin(box, 1.0 * units.fs, temperature_K=350, friction=0.02 / units.fs, rng=generator)
dynamics.run(60)
snapshots = []
for _ in range(30):
    dynamics.run(9)
    snapshots.append(box.copy())
temperature = np.mean([atoms.get_temperature() for atoms in snapshots])
print(f"{len(snapshots)} frames of {len(box)} atoms, {temperature:.0f} K on average")

# %% [markdown]
# ## Label
#
# The box is still hotter than its thermostat, since the energy of the lattice has become heat. For frames to train on
# that is no harm; averages of the liquid would need a longer run first.
#
# Successive frames of a trajectory are alike. A split at random would put the twin of nearly every test frame among
# the training frames and flatter the result, so the split is in time: the first 20 train, the next 4 validate, the
# last 6 test.

# %%
teacher = forcetune.calculator("sevennet-mf-0", head="R2SCAN")


def labelled(snapshot):
    atoms = snapshot.copy()
    atoms.calc = teacher
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


frames = [labelled(snapshot) for snapshot in snapshots]
parts = {"train": frames[:20], "valid": frames[20:24], "test": frames[24:]}
for name, part in parts.items():
    write(f"{name}.xyz", part)
checkup = forcetune.doctor("train.xyz", model="sevennet-0", test="test.xyz")
for finding in checkup.findings:
    print(f"{finding.severity} {finding.code}: {finding.message}")

# %% [markdown]
# ## Fit
#
# Every frame has the same composition, so that reference energies of hydrogen and oxygen cannot be told apart: only
# their sum for a water molecule is determined, which is all that a simulation of water needs. Stress is trained on
# because the frames have it; without it the density of the liquid would be left to chance.

# %%
run = forcetune.fit(
    "train.xyz",
    model="sevennet-0",
    method="elora",
    valid="valid.xyz",
    test="test.xyz",
    epochs=8,
    out="run",
    settings={
        "training.loss.energy": 100.0,
        "training.schedule.name": "cosine",
        "training.batch_size": 2,
        "training.ema": 0.95,
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
# ## Between molecules
#
# Most of a force in water belongs to stiff O–H bonds, and an error per atom is mostly an error of vibrations. How
# molecules move, the liquid, is decided by the force on each molecule as a whole, and its density by the pressure.
# Both are in the same predictions:

# %%
tuned = forcetune.calculator("run")
predictions = {}
for name, calculator in (("teacher", None), ("sevennet-0", student), ("tuned", tuned)):
    whole, pressure = [], []
    for frame in parts["test"]:
        atoms = frame.copy()
        atoms.calc = calculator or frame.calc
        whole.append(atoms.get_forces().reshape(16, 3, 3).sum(axis=1))
        pressure.append(-atoms.get_stress()[:3].mean() / units.GPa)
    predictions[name] = np.array(whole), np.array(pressure)
known_force, known_pressure = predictions.pop("teacher")
print(f"force on a molecule: typical size {1000 * np.sqrt((known_force**2).mean()):.0f} meV/Å")
figure, axes = plt.subplots(1, 2)
for (name, (force, pressure)), color in zip(predictions.items(), (orange, green), strict=True):
    error = 1000 * np.sqrt(((force - known_force) ** 2).mean())
    offset = (pressure - known_pressure).mean()
    print(f"{name:10}: RMSE of it {error:5.0f} meV/Å, pressure off by {offset:+.2f} GPa on average")
    axes[0].plot(known_force.ravel(), force.ravel(), ".", markersize=2, color=color, label=name)
    axes[1].plot(known_pressure, pressure, "o", markersize=4, color=color, label=name)
axes[0].set(xlabel="force on a molecule, eV/Å", ylabel="predicted")
axes[1].set(xlabel="pressure, GPa")
for axis in axes:
    axis.axline((known_force.mean(), known_force.mean()), slope=1, color="0.6", linewidth=0.8)
axes[1].legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## A hydrogen bond that was not trained on
#
# Two molecules alone, pulled apart along their hydrogen bond: no frame of the liquid has vacuum in it. Energies count
# from the largest distance. **Here the fit does not help:**

# %%
pair = Atoms("OHHOHH", [(0, 0, 0), (0.96, 0, 0), (-0.24, 0.93, 0), (2.9, 0, 0), (3.2, 0.1, 0.93), (3.2, 0.1, -0.93)])
distances = np.concatenate((np.arange(2.5, 3.6, 0.1), np.arange(3.75, 6.1, 0.25)))
figure, axis = plt.subplots()
styles = ({"color": "0.6", "linewidth": 4}, {"color": orange, "linestyle": "--"}, {"color": green})
for (name, calculator), style in zip(
    {"teacher": teacher, "sevennet-0": student, "tuned": tuned}.items(), styles, strict=True
):
    energies = []
    for distance in distances:
        atoms = pair.copy()
        atoms.positions[3:, 0] += distance - 2.9
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
    energies = 1000 * (np.array(energies) - energies[-1])
    print(f"{name:10}: {energies.min():6.0f} meV at {distances[energies.argmin()]:.1f} Å")
    axis.plot(distances, energies, label=name, **style)
axis.set(xlabel="O–O distance, Å", ylabel="energy, meV", ylim=(-350, 200))
axis.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# The foundation model binds the pair about twice as strongly as the teacher, and the tuned model still more, although
# every error in the liquid went down. Frames of a liquid at one density say what molecules feel among neighbors on all
# sides; what two of them do alone is not in these labels, and where a fit leaves it is chance. A tuned model is good
# for frames like those it saw: for vapour, clusters or a surface, some of these belong among the training frames, and
# among the test frames, or nobody would notice.
#
# ## In motion
#
# 0.15 ps at constant energy from the last frame, which the training never saw: enough to see that
# nothing breaks. A diffusion coefficient or a density takes a larger box and some hundred picoseconds
# ([simulate](../simulate.md) says with what), and nuclear quantum effects are another matter again.

# %%
atoms = snapshots[-1].copy()
atoms.calc = tuned
MaxwellBoltzmannDistribution(atoms, temperature_K=350, rng=generator)
dynamics = VelocityVerlet(atoms, timestep=1.0 * units.fs)
total, bonds = [], []


def record():
    total.append(atoms.get_total_energy() / len(atoms))
    oxygen, hydrogen = atoms.positions[::3], np.stack((atoms.positions[1::3], atoms.positions[2::3]))
    bonds.append(np.linalg.norm(hydrogen - oxygen, axis=-1).max())


dynamics.attach(record, interval=3)
dynamics.run(150)
print(f"total energy: fluctuates by {1000 * np.std(total):.2f} meV/atom; longest O–H bond ever: {max(bonds):.2f} Å")

# %% [markdown]
# ## Where to go from here
#
# - Labels of your own: any file that [data](../data.md) lists; a step of a trajectory every 20 to 50 fs is enough.
# - New frames where the tuned model is least sure, instead of more of the same: `forcetune select`
#   ([uncertainty](../uncertainty.md)).
# - Longer and larger: the same run in LAMMPS, OpenMM or torch-sim ([simulate](../simulate.md)).
