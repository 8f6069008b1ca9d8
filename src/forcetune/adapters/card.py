"""The model card that an adapter folder has on this machine; that of a published one has more."""

from __future__ import annotations

import json
from collections.abc import Mapping

from forcetune.adapters.config import AdapterConfig


def describe_adapter(config: AdapterConfig) -> str:
    """The model card, with the metadata block that model hubs read."""
    base, method = config.base, config.method
    trained = f"{config.trainable:,} trained parameters on {base.parameters:,} frozen ones"
    identity = f"SHA-256 `{base.sha256 or 'not from a file'}`, fingerprint `{base.fingerprint}`"
    description = method["description"][:1].upper() + method["description"][1:]
    lines = [
        "---",
        "library_name: forcetune",
        f"base_model: {json.dumps(base.name)}",
        f"license: {json.dumps(base.licence.lower())}",
        "tags: [interatomic-potential, adapter]",
        "---",
        "",
        f"# {method['name']} adapter for {base.name}",
        "",
        f"{description}; {trained}. Elements: {', '.join(base.elements)}. Energies in eV, lengths in Å.",
        "",
        f"It works on one base only: {base.name} ({base.library}, head {base.head}, {identity}).",
        f"The licence of the base ({base.licence}) holds for the combination.",
        "",
        "```python",
        "from forcetune import calculator",
        "",
        f"atoms.calc = calculator({base.name!r}, adapter='path/to/this/folder')",
        "```",
        "",
    ]
    errors = config.metrics.get("errors")
    if isinstance(errors, Mapping) and errors:
        lines += ["| frames | energy MAE, meV/atom | force MAE, meV/Å |", "|---|--:|--:|"]
        for split, split_errors in errors.items():
            energy, forces = (split_errors.get(key) for key in ("energy_mae_mev_per_atom", "forces_mae_mev_per_ang"))
            texts = ["–" if value is None else f"{value:.3g}" for value in (energy, forces)]
            lines.append(f"| {split} | {texts[0]} | {texts[1]} |")
        lines.append("")
    lines += [f"Written by forcetune {config.forcetune}.", ""]
    return "\n".join(lines)
