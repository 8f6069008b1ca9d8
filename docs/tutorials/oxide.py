# %% [markdown]
# # A magnetic oxide with `sevennet-0`
#
# Nickel oxide is an antiferromagnet, and a foundation model does not know it: `sevennet-0` has no spins, so that every
# magnetic state of a structure has one energy. `--magnetic` adds a layer that takes a magnetic state and predicts
# moments and their energy ([what it computes](../magnetism.md)). Here it learns non-collinear spins from 40 frames, and
# is then asked for three things it was never shown: the energies of perfect magnetic orders, the exchange constants,
# and the ground state.
#
# **Read this page to its end before you do the same.** Errors on test frames fall to a fifth, and yet only one of the
# answers is right: the gap to the ferromagnet. Another order, the exchange constants and the ground state come out
# wrong. Forty frames are too few for them, and the test frames do not show it.
#
# Constrained non-collinear DFT takes a cluster. So that everyone can repeat this page, the labels are made by a model
# whose answers are known: the lattice of `sevennet-l3i5`, and on it a Heisenberg model with the exchange constants that
# neutrons see in NiO (Hutchings and Samuelsen, Phys. Rev. B 6, 3447 (1972)): weakly ferromagnetic between nearest
# nickel neighbors, J₁ = 1.4 meV, and strongly antiferromagnetic between second ones, across an oxygen,
# J₂ = −19 meV. That they fall off with distance, and how fast, is made up here. The models come in the wheel of
# `sevenn`: `pip install --no-deps sevenn==0.13.0`.

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np
from ase.build import bulk
from ase.io import write
from ase.neighborlist import neighbor_list

import forcetune

warnings.simplefilter("ignore")
plt.rcParams |= {"figure.dpi": 80, "figure.figsize": (6.4, 3.0), "axes.spines.top": False, "axes.spines.right": False}
generator = np.random.default_rng(5)
lattice_constant, moment = 4.18, 1.7

# %% [markdown]
# ## Labels with known answers
#
# E = E_lattice − Σ J(r) eᵢ·eⱼ over pairs of nickel, each once, with unit vectors e; forces follow from J′(r).

# %%
teacher = forcetune.calculator("sevennet-l3i5")


def exchange(distance):
    """J(r) and J′(r), eV and eV/Å: around each of the two shells an exponential that ends smoothly 0.6 Å away."""
    value, slope = np.zeros_like(distance), np.zeros_like(distance)
    for center, strength, decay in ((lattice_constant / np.sqrt(2), 1.4e-3, 1.5), (lattice_constant, -19e-3, 2.5)):
        x = (distance - center) / 0.6
        window = np.where(abs(x) < 1, (1 - x**2) ** 2, 0.0)
        window_slope = np.where(abs(x) < 1, -4 * x * (1 - x**2) / 0.6, 0.0)
        shell = strength * np.exp(-decay * (distance - center))
        value += shell * window
        slope += shell * (window_slope - decay * window)
    return value, slope


def label(atoms, spins):
    """Energy, forces, spins and moments, under names that forcetune looks for."""
    atoms.calc = teacher
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    i, j, distance, vectors = neighbor_list("ijdD", atoms, {("Ni", "Ni"): 4.9})
    value, slope = exchange(distance)
    product = (spins[i] * spins[j]).sum(axis=1)
    energy -= 0.5 * (value * product).sum()
    np.add.at(forces, i, -(slope * product / distance)[:, None] * vectors)
    atoms.calc = None
    atoms.info["REF_energy"] = energy
    for name, values in (("forces", forces), ("spins", spins), ("magmoms", moment * spins)):
        atoms.arrays[f"REF_{name}"] = values
    return atoms


# %% [markdown]
# ## Frames
#
# Sixteen atoms, strained and shaken. Spins are tilted at random out of the antiferromagnet or the ferromagnet, or are
# random altogether; a perfect order is never among them. Oxygen has the spin zero, which is none.


# %%
def crystal(a=lattice_constant):
    atoms = bulk("NiO", "rocksalt", a=a) * (2, 2, 2)
    atoms.set_initial_magnetic_moments(None)  # which ASE gives to nickel
    return atoms


def along_z(wave):
    """Spins of the perfect cell whose sign follows a wave vector in units of 2π/a; (½, ½, ½) is that of NiO."""
    atoms = crystal()
    sign = np.round(np.cos(2 * np.pi * atoms.positions @ wave / lattice_constant))
    return np.outer(sign * (atoms.numbers == 28), (0.0, 0.0, 1.0))


def unit(vectors):
    """Unit vectors on nickel, zero on oxygen."""
    vectors = vectors * (crystal().numbers == 28)[:, None]
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


ORDERS = {"ferromagnet": (0, 0, 0), "antiferromagnet [001]": (0, 0, 1), "antiferromagnet [111]": (0.5, 0.5, 0.5)}


def frame(number):
    atoms = crystal()
    strain = generator.uniform(-0.03, 0.03, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.rattle(0.06, rng=generator)
    kind = number % 3
    start = along_z(ORDERS["antiferromagnet [111]" if kind == 0 else "ferromagnet"])
    tilt = 10.0 if kind == 2 else generator.uniform(0.1, 0.8)
    return label(atoms, unit(start + tilt * generator.normal(size=(len(atoms), 3))))


frames = [frame(number) for number in range(52)]
for name, part in (("train", frames[:40]), ("valid", frames[40:46]), ("test", frames[46:])):
    write(f"{name}.xyz", part)
print(f"{len(frames)} frames of {len(frames[0])} atoms")

# %% [markdown]
# ## Fit
#
# `elora` adapts the lattice, the layer learns the magnetism. With a magnetic layer energies are per atom in the loss;
# as exchange is some meV beside the eV of a shaken lattice, they get a larger weight. The layer starts from nothing,
# and at its default rate of 0.005, without a warm-up and with two frames a step, the second epoch was off by hundreds
# of meV/atom and fifteen did not recover. A warm-up, a lower rate and four frames a step keep it calm.

# %%
run = forcetune.fit(
    "train.xyz",
    model="sevennet-0",
    method="elora",
    valid="valid.xyz",
    test="test.xyz",
    epochs=60,
    out="run",
    settings={
        "magnetism.layer": "spin",
        "magnetism.learning_rate": 2e-3,
        "training.loss.energy": 10.0,
        "training.schedule.name": "cosine",
        "training.schedule.warmup_epochs": 3,
        "training.batch_size": 4,
        "training.ema": 0.95,
        "model.dtype": "float32",
        "output.forgetting": False,
    },
)
before, after = run.before["test"], run.after["test"]
print(f"test energy:  {before.energy_mae_mev_per_atom:6.2f} → {after.energy_mae_mev_per_atom:5.2f} meV/atom")
print(f"test forces:  {before.forces_mae_mev_per_ang:6.1f} → {after.forces_mae_mev_per_ang:5.1f} meV/Å")

# %% [markdown]
# ## Orders that were not trained on
#
# The perfect ferromagnet and two antiferromagnets, each against that of NiO, [111]. For the untouched foundation model
# all of these differences are zero.

# %%
tuned = forcetune.calculator("run")


def energy(atoms, spins):
    """By the known model and by the tuned one, meV per nickel."""
    known = label(atoms.copy(), spins).info["REF_energy"]
    atoms = atoms.copy()
    atoms.set_initial_magnetic_moments(moment * spins)
    atoms.calc = tuned
    return 1000 * np.array([known, atoms.get_potential_energy()]) / 8


perfect, wave = crystal(), ORDERS["antiferromagnet [111]"]
ground = energy(perfect, along_z(wave))
for name, other in ORDERS.items():
    known, learned = energy(perfect, along_z(other)) - ground
    print(f"{name:21}: known {known:6.1f}, learned {learned:6.1f} meV/Ni")

# %% [markdown]
# The ferromagnet, near which a third of the frames lie, is right within a few percent. The order [001], near which
# there are none, is wrong altogether: it should be as high as the ferromagnet, and is below the [111] order.
#
# Between two of them, the spins of one sublattice are turned together, from parallel to antiparallel (left); and the
# constants themselves, at several lattice constants, come from small rotations out of the antiferromagnet
# (`exchange_parameters`, right). In this small cell a neighbor of the first shell stands for two of them, by its
# images, and the only one of the second shell for all six.

# %%
angles = np.linspace(0, np.pi, 13)
down = along_z(wave)[:, 2] < 0
turned = []
for angle in angles:
    spins = along_z(ORDERS["ferromagnet"])
    spins[down] = np.sin(angle), 0.0, np.cos(angle)
    turned.append(energy(perfect, spins) - ground)
known, learned = np.transpose(turned)
lengths = np.linspace(4.08, 4.28, 9)
constants = []
for length in lengths:
    atoms = crystal(length)
    atoms.set_initial_magnetic_moments(moment * along_z(wave))
    atoms.calc = tuned
    pairs = forcetune.exchange_parameters(atoms, sites=[0])
    nickel = atoms.numbers[pairs.second] == 28
    first, second = nickel & (pairs.distance < 3.5), nickel & (pairs.distance > 3.5)
    constants.append((1000 * pairs.coupling[first].mean() / 2, 1000 * pairs.coupling[second].mean() / 6))
first, second = np.transpose(constants)
here = np.argmin(abs(lengths - lattice_constant))
print(f"J₁ = {first[here]:.1f} meV (known 1.4), J₂ = {second[here]:.1f} meV (known −19.0)")
figure, axes = plt.subplots(1, 2)
axes[0].plot(np.degrees(angles), known, color="0.6", linewidth=4, label="known")
axes[0].plot(np.degrees(angles), learned, color="#0b6e4f", label="learned")
axes[0].set(xlabel="angle between sublattices, °", ylabel="energy, meV/Ni", xticks=(0, 60, 120, 180))
axes[1].plot(lengths, 1000 * exchange(lengths / np.sqrt(2))[0], color="0.6", linewidth=4)
axes[1].plot(lengths, 1000 * exchange(lengths)[0], color="0.6", linewidth=4)
axes[1].plot(lengths, first, "s", color="#b04a00", label="J₁")
axes[1].plot(lengths, second, "o", color="#0b6e4f", label="J₂")
axes[1].set(xlabel="lattice constant, Å", ylabel="exchange, meV")
for axis in axes:
    axis.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# Only the ends of the curve are right. J₂ has the right sign and falls off with distance, but a part of it went to J₁,
# which has the wrong one: the gap to the ferromagnet contains only their sum. Random spins tell them apart, but there
# exchange is a few meV per nickel, and the error on test frames, presumably most of it of the lattice, is as large.
#
# ## The ground state, from nothing
#
# Random spins in the perfect crystal, turned to the lowest energy at fixed positions.

# %%
atoms = crystal()
atoms.set_initial_magnetic_moments(moment * unit(generator.normal(size=(len(atoms), 3))))
atoms.calc = tuned
relaxed = forcetune.relax_spins(atoms)
start, end = (1000 * energy / 8 - ground[1] for energy in (relaxed.energy_before, relaxed.energy_after))
print(f"energy above the [111] antiferromagnet: {start:.1f} → {end:.2f} meV/Ni")
final = atoms.get_initial_magnetic_moments()[atoms.numbers == 28] / moment
axis = final[0]
print("along the first spin:", " ".join(f"{value:+.2f}" for value in final @ axis))

# %% [markdown]
# The spins end below the [111] antiferromagnet, in another order: this model should not be asked for a ground state.
#
# ## Where to go from here
#
# - What this page lacks, and has not tried: more frames, more of them with random spins, and several magnetic states of
#   the same structure, whose differences have no error of the lattice in them. Put the orders that you will ask for
#   among the test frames.
# - Frames of DFT: under which names moments, and the state they were held in, are looked for is in
#   [magnetism](../magnetism.md).
# - Coupling of spins to directions in space: `"magnetism.spin_orbit": True`.
# - Collinear data, as in MPtrj: `"magnetism.layer": "magnitude"` predicts |μ|.
