# ruff: noqa: E501 (a row of a table in Markdown is one line)
"""``docs/mace_train.md``, written from the table of options: ``python -m forcetune.cli.mace_train.document > FILE``."""

from __future__ import annotations

from forcetune.cli.mace_train.models import NAMES
from forcetune.cli.mace_train.option import Handling, MaceOption
from forcetune.cli.mace_train.options import MACE_VERSION, OPTIONS

_HEAD = f"""# The arguments of `mace_run_train`

`forcetune mace-train` takes the command lines of mace (`mace_run_train`, `python -m mace.cli.run_train`) and of the MMEA
code as they are, `--config FILE.yaml` and abbreviations included, and fine-tunes by method `mmea` if nothing else is said:

```
forcetune mace-train --name aspirin --train_file train.xyz --valid_fraction 0.5 --test_file test.xyz --E0s average \\
    --foundation_model medium_off --loss ef --lr 0.005 --forces_weight 1000 --energy_weight 1 --batch_size 5 \\
    --max_num_epochs 500 --ema --ema_decay 0.995 --swa --start_swa 400 --error_table TotalMAE --seed 123
```

It prints the `forcetune fit` command and the YAML configuration that do the same, says what is done otherwise, trains, and
ends with mace's error table. `--dry_run` stops before the training. Options of its own: `--method`, `--rank`, `--out`,
`--overwrite`, `--trust`, and `--set section.key=value`, which wins over everything else. Not given, an option has mace's
default (except label keys, which are detected). An option without a counterpart is refused (exit code 2) where it would
change the result, and named and ignored where it would not; nothing is passed over in silence. mace need not be
installed.

Methods that merge also write `model_dir/name.model`, which mace loads; where that fails, the run stays and the exit code is
1. Gates (`mmea`) do not merge, and are used through `forcetune.calculator` or `forcetune export`.

## Adapters that mace trained

Checkpoints of `mace_run_train --lora True` have base and factors apart, and become an adapter of method `lora` that gives
the same energies: `forcetune import-lora checkpoints/NAME_run-123_epoch-10.pt --model BASE --alpha 1.0 -o adapter`. The
`.model` that mace writes has them merged, where they cannot be separated; it is used as any other model.

## Losses

With N atoms, and means over frames and over all components of forces F and stress σ:

| `--loss` | here | in mace {MACE_VERSION} |
|---|---|---|
| `weighted` | w_E (ΔE/N)² + w_F ΔF² | the same |
| `ef` | w_E ΔE² + w_F ΔF², energies of whole frames, as in the MMEA code | `weighted` with weights 1 and 1, whatever is given |
| `forces_only` | w_F ΔF² | the same |
| `stress` | `weighted` + w_S Δσ² | the same |
| `huber` | Huber's function of ΔE/N, ΔF and Δσ | the same |
| `virials` | `weighted` + w_V (V Δσ/N)², V the volume: virials for each atom | the same |
| `universal` | as `huber`, with smaller δ for atoms with forces above 100 eV/Å, weights of labels inside Huber's function | the same |
| `l1l2energyforces` | w_E \\|ΔE/N\\| + w_F \\|ΔF\\|, the length of each atom's error | the same |
| `dipole`, `dipole_polar`, `energy_forces_dipole` | refused | |

Stage two (`--swa`) keeps `stress`, `virials` and `universal`; all others become `weighted` with its own weights, as in mace. Its
learning rate may fall on a plateau here, and is constant in mace. Weights in the file (`config_weight`,
`config_energy_weight`, …) count in both; mace passes over all of them with `huber`, over those of frames with `universal`
and over those of forces with `l1l2energyforces`. Labels that a frame lacks do not count, and the mean goes over those there are;
mace's mean goes over all.

## What else differs

- mace trains all weights with `--foundation_model` alone; here that is `--method full`.
- The last batch of an epoch is trained on even if it is smaller.
- `ema` starts with a small decay that grows to the one given.
- With replay (`--pt_train_file`), all heads share the tuned readouts, and frames of the replay file have an energy of
  their own from the features, which is not kept. Their number for each training frame is that of mace.
- In the environment `MMEA_RANK`, `MMEA_STD` and `MMEA_PHI` are read, as the MMEA code does, unless an option sets the same.
  Without `MMEA_STD` it starts the shift of gates at random values; here it starts at zero, so that the start is the
  foundation model.

## Foundation models

{{models}}

Other names are those of `forcetune models`, or paths.

## Every option

"""
_TITLES = {
    Handling.MAPPED: "Mapped",
    Handling.NETWORK: "Of the foundation model",
    Handling.IGNORED: "Named and ignored",
    Handling.REFUSED: "Refused unless it has mace's default",
}
_NETWORK_NOTE = (
    "The architecture is that of the foundation model, in mace, too; the line that names them says so: {names}.\n"
)


def document() -> str:
    """The page."""
    models = "| mace | forcetune |\n|---|---|\n" + "\n".join(f"| `{a}` | `{b}` |" for a, b in NAMES.items())
    parts = [_HEAD.replace("{models}", models)]
    for handling, title in _TITLES.items():
        options = [option for option in OPTIONS if option.handling is handling]
        parts.append(f"### {title}\n\n")
        if handling is Handling.NETWORK:
            parts.append(_NETWORK_NOTE.format(names=", ".join(f"`{option.flags[0]}`" for option in options)) + "\n")
            continue
        parts.append("| option | default of mace | what becomes of it |\n|---|---|---|\n")
        parts += [_row(option) for option in options]
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


def _row(option: MaceOption) -> str:
    flags = ", ".join(f"`{flag}`" for flag in option.flags)
    origin = " (MMEA)" if option.origin == "MMEA" else ""
    default = "" if option.default is None or option.kind in ("set", "unset") else f"`{option.default}`"
    explanation = option.explanation.replace("|", "\\|")
    return f"| {flags}{origin} | {default} | {explanation} |\n"


if __name__ == "__main__":
    print(document(), end="")
