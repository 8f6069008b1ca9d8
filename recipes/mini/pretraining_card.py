"""The cards of the models ``mini`` and ``organic``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forcetune.utils.files import compute_sha256
from recipes.mini.repulsion import REACH, PairScan

TEXT = """# {name}

{purpose}

**Architecture.** Two interactions, {channels}, correlation 3, spherical harmonics up to order 3, cutoff {cutoff} Å,
ZBL pair repulsion; {parameters:,} parameters, {size:.2f} MB in float32, SHA-256 `{sha256}`.

**Level of theory.** GFN2-xTB, closed shells, no solvent. Energies are total energies in eV; free atoms have exactly
their GFN2-xTB energies.

**Data.** {train:,} training and {valid:,} validation frames made by `python -m recipes.mini.pretraining_data`: minima,
dynamics at 300 to 1500 K, displaced, stretched and compressed structures of {molecules} small molecules, pairs of
them in contact, scans of all pairs of elements. The molecules of rMD17, 3BPA, acetylacetone and the molecule of the
demo are not among them.

**Training.** `python -m recipes.mini.pretraining{option}`: method `scratch`, float32, {epochs} epochs, batches of
{batch} frames, Adam (amsgrad) with cosine from {rate:g}, moving average; {hours:.1f} h on one core
({processor}, shared with other work). forcetune {forcetune}, mace-torch {mace}, torch {torch}, Python {python}.

**Errors** on frames it was not trained on. Energies in meV/atom, forces in meV/Å over all components:

| frames | of | energy MAE | energy RMSE | forces MAE | forces RMSE | rms force in the data |
|---|---|---|---|---|---|---|
{errors}

`valid` holds other frames of the training molecules; the molecules of the other rows were never trained on.

**Short distances.** All {pairs} pairs of elements were scanned from {shortest:.1f} Å outwards in steps of 0.02 Å;
from 0.75 of the sum of the covalent radii to where the pair is {barrier:.0f} eV above the free atoms {holes}.{dips}

**Limits.** Neutral closed-shell molecules of up to some twenty atoms. No ions, radicals, metals, bond breaking far from
the minima of the training molecules, bulk phases; no long-range electrostatics beyond the cutoff of {reach:.0f} Å in
two steps. The errors above are those against GFN2-xTB, whose own errors come on top: fine-tune it to your own data.

**Licence.** MIT, as the package; the data were made by its authors.
"""

PURPOSES = {
    "mini": """A small MACE for organic molecules of {elements}, made to learn and to test with: `forcetune demo` and
`forcetune fit` without `--model` start from it. It comes with the package and needs no download.""",
    "organic": """A MACE for organic molecules of {elements} of the size of published foundation models, made to compare
methods of fine-tuning with: the data of `mini`, four times as many channels. It is part of the repository and not of
the package; `--model benchmarks/models/organic.safetensors` starts from it.""",
}

ROWS = {
    "valid": "other frames of the training molecules",
    "test_molecules": "new molecules: minima, dynamics, displaced",
    "test_dimers": "pairs of new molecules in contact",
    "test_compressed": "new molecules, stretched and compressed",
}


def card(
    results: Mapping[str, Any],
    errors: Mapping[str, Mapping[str, Any]],
    statistics: Mapping[str, Any],
    scans: Sequence[PairScan],
    model: Path,
    irreps: str,
) -> str:
    """The model card, markdown.

    Args:
        results: of the training run (``results.json``).
        errors: of the model by set of frames, as :meth:`forcetune.evaluation.metrics.Errors.to_json` gives them.
        statistics: of the data (``statistics.json``).
        scans: of all pairs of elements.
        model: the file, named as the model is.
        irreps: of its node features.
    """
    tables = statistics["files"]
    parameters = results["parameters"]["total"]
    environment, training = results["environment"], results["training"]
    config = results["model"]
    elements = ", ".join(config["elements"])
    return TEXT.format(
        name=model.stem,
        purpose=PURPOSES[model.stem].format(elements=elements),
        option="" if model.stem == "mini" else f" --name {model.stem}",
        channels=irreps,
        cutoff=f"{config['cutoff_ang']:g}",
        reach=2 * config["cutoff_ang"],
        parameters=parameters,
        size=model.stat().st_size / 1e6,
        sha256=compute_sha256(model),
        train=results["data"]["train"]["n_frames"],
        valid=results["data"]["valid"]["n_frames"],
        molecules=statistics["molecules"],
        epochs=training["epochs_done"],
        batch=training["batch_size"],
        rate=training["learning_rate"],
        hours=training["seconds"] / 3600,
        processor=environment["device"],
        forcetune=environment["forcetune"],
        mace=environment["mace-torch"],
        torch=environment["torch"],
        python=environment["python"],
        errors="\n".join(_row(name, errors[name], tables[name]) for name in ROWS),
        pairs=len(scans),
        holes=_listed(scans, "hole") or "none attracts",
        dips=_dips(scans),
        barrier=REACH,
        shortest=min(scan.distances[0] for scan in scans),
    )


def _listed(scans: Sequence[PairScan], what: str) -> str:
    found = ((scan, getattr(scan, what)) for scan in scans)
    return ", ".join(f"{'–'.join(scan.symbols)} at {place:.2f} Å" for scan, place in found if place is not None)


def _dips(scans: Sequence[PairScan]) -> str:
    found = _listed(scans, "dip")
    return f" Nearer, behind that wall, there are dips: {found}." if found else ""


def _row(name: str, errors: Mapping[str, float], kinds: Mapping[str, Mapping[str, float]]) -> str:
    atoms = sum(kind["atoms"] for kind in kinds.values())
    spread = sum(kind["atoms"] * kind["forces_rms"] ** 2 for kind in kinds.values()) / atoms
    numbers = (
        f"{errors['energy_mae_mev_per_atom']:.1f}",
        f"{errors['energy_rmse_mev_per_atom']:.1f}",
        f"{errors['forces_mae_mev_per_ang']:.0f}",
        f"{errors['forces_rmse_mev_per_ang']:.0f}",
        f"{1000 * spread**0.5:.0f}",
    )
    return f"| {name} | {errors['n_frames']:,} {ROWS[name]} | {' | '.join(numbers)} |"
