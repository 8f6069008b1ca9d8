"""Methods side by side: the same frames, the same number of steps, one table.

python examples/compare_methods.py [FOLDER]
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import forcetune

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "compared")
table = Table("method", "trained parameters", "adapter, kB", "forces MAE, meV/Å")
for name in ("readout", "elora", "mmea"):
    run = forcetune.fit(
        forcetune.demo_file("train"),
        model="mini",
        method=name,
        valid=forcetune.demo_file("valid"),
        test=forcetune.demo_file("test"),
        epochs=10,
        out=folder / name,
    )
    before, after = (errors["test"].forces_mae_mev_per_ang for errors in (run.before, run.after))
    size = run.results["adapter_bytes"] / 1000
    table.add_row(name, f"{run.results['parameters']['trainable']:,}", f"{size:.0f}", f"{before:.0f} → {after:.0f}")
Console().print(table)
