"""Methods side by side: the same frames, the same number of steps, one table and one page.

    python examples/compare_methods.py [FOLDER]

On the command line: forcetune compare TRAIN --valid VALID --test TEST --methods readout,elora,mmea --epochs 10
"""

import sys

from rich.console import Console

import forcetune
from forcetune.reports.comparison_page import table

config = forcetune.load_config(
    given={
        "data": {part: [str(forcetune.demo_file(part))] for part in ("train", "valid", "test")},
        "model": {"model": "mini"},
        "training": {"epochs": 10},
        "output": {"run": sys.argv[1] if len(sys.argv) > 1 else "compared"},
    }
)
compared = forcetune.compare(config, ["readout", "elora", "mmea"])
Console().print(table(compared.comparison))
print(compared.comparison.reason, f"Look at {compared.page}", sep="\n")
