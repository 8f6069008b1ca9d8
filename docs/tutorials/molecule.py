# %% [markdown]
# # A molecule with `mini`
#
# The smallest complete job: a foundation model that comes with the package, DFT frames that come with the package, and
# an adapter that brings the two together. Nothing is downloaded. The frames are 2-aminoethanol at PBE0/def2-SVP; `mini`
# was trained on GFN2-xTB and has never seen this molecule at this level.

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np
from ase import units
from ase.io import read
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

import forcetune

warnings.simplefilter("ignore")
plt.rcParams |= {"figure.dpi": 80, "figure.figsize": (6.4, 3.0), "axes.spines.top": False, "axes.spines.right": False}

train, valid, test = (forcetune.demo_file(part) for part in ("train", "valid", "test"))
frames = read(train, ":")
labels = [name for name in (*frames[0].info, *frames[0].arrays) if name.startswith("REF")]
print(f"{len(frames)} training frames of {frames[0].get_chemical_formula()}, labels: {', '.join(labels)}")

# %% [markdown]
# ## Look before you train
#
# Labels of another level of theory lie thousands of eV away from the foundation model, because every program counts
# energies from another zero. That is not an error of the model: reference energies (E0) are re-estimated before
# training. What the doctor looks for is everything else.

# %%
checkup = forcetune.doctor(train, model="mini", test=test)
print(f"errors: {sum(finding.severity == 'error' for finding in checkup.findings)}")
for finding in checkup.findings:
    print(f"{finding.severity} {finding.code}")

# %% [markdown]
# ## Fit
#
# `mmea` puts gates on every equivariant linear layer and low-rank updates elsewhere. A
# learning rate that falls along a cosine and averaged weights (EMA) suit a short run.

# %%
run = forcetune.fit(
    train,
    model="mini",
    method="mmea",
    valid=valid,
    test=test,
    epochs=20,
    out="run",
    settings={"training.schedule.name": "cosine", "training.ema": 0.95, "output.forgetting": False},
)
for name in ("valid", "test"):
    before, after = run.before[name], run.after[name]
    print(
        f"{name:6} energy {before.energy_mae_mev_per_atom:6.2f} → {after.energy_mae_mev_per_atom:5.2f} meV/atom"
        f"   forces {before.forces_mae_mev_per_ang:6.1f} → {after.forces_mae_mev_per_ang:5.1f} meV/Å"
    )

# %% [markdown]
# "Before" is the foundation model with the run's reference energies, so that the comparison is about shapes of the
# energy surface and not about its zero. The table of every epoch is in the run folder, beside `report.html`, which has
# all of this with more pictures.

# %%
table = np.genfromtxt("run/metrics.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
figure, axis = plt.subplots()
axis.semilogy(table["epoch"], table["valid_forces_mae_mev_per_ang"], color="#0b6e4f")
axis.set(xlabel="epoch", ylabel="validation forces MAE, meV/Å")
figure.tight_layout()

# %% [markdown]
# ## Use it
#
# A run folder is a calculator of ASE. Here are the forces of twenty frames that were never trained on, as DFT has them
# and as the two models predict them.

# %%
untouched, tuned = forcetune.calculator("mini"), forcetune.calculator("run")
dft, zero_shot, fitted = [], [], []
for atoms in read(test, ":20"):
    dft.append(atoms.arrays["REF_forces"])
    for calculator, column in ((untouched, zero_shot), (tuned, fitted)):
        copy = atoms.copy()
        copy.calc = calculator
        column.append(copy.get_forces())
figure, axes = plt.subplots(1, 2, sharex=True, sharey=True)
for axis, column, title in zip(axes, (zero_shot, fitted), ("mini", "mini + adapter"), strict=True):
    axis.plot(np.ravel(dft), np.ravel(column), ".", markersize=2, color="#0b6e4f")
    axis.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
    axis.set(title=title, xlabel="DFT force, eV/Å")
axes[0].set_ylabel("predicted force, eV/Å")
figure.tight_layout()

# %% [markdown]
# A potential that is right on frames can still be wrong in motion. Half a picosecond at constant energy is a quick
# check: the total energy should wander by far less than the kinetic energy does.

# %%
atoms = read(test, "0")
atoms.calc = tuned
MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)
potential, total = [], []
dynamics.attach(lambda: potential.append(atoms.get_potential_energy()) or total.append(atoms.get_total_energy()), 5)
dynamics.run(1000)
time = np.arange(len(total)) * 2.5 / 1000
figure, axis = plt.subplots()
for values, label, color in ((potential, "potential", "0.6"), (total, "total", "#0b6e4f")):
    axis.plot(time, 1000 * (np.array(values) - values[0]) / len(atoms), label=label, color=color)
axis.set(xlabel="time, ps", ylabel="energy from start, meV/atom")
axis.legend(frameon=False)
figure.tight_layout()
print(f"fluctuation of the total energy: {1000 * np.std(total) / len(atoms):.2f} meV/atom")

# %% [markdown]
# ## Where to go from here
#
# - Your own frames: replace `train` by a file; a fraction such as `valid=0.1` splits it.
# - A larger foundation model: `model="mace-off23-medium"` for organic molecules ([which model](../models.md)).
# - A plain model that other programs read: train with `method="elora"`, then `forcetune merge run -o tuned.model`.
# - How it was decided what to train: [methods](../methods.md).
