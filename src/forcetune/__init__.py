"""Fine-tune pretrained equivariant interatomic potentials on your own DFT data by training a small adapter.

>>> import forcetune
>>> run = forcetune.fit("train.xyz", model="mace-off23-medium", method="elora", test="test.xyz")
>>> atoms.calc = forcetune.calculator(run.folder)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from forcetune._version import __version__

if TYPE_CHECKING:
    from forcetune.adapters.attach import Adapter, attach, detach, disable_adapter
    from forcetune.adapters.combine import Combination, combine
    from forcetune.adapters.file import load_adapter, save_adapter
    from forcetune.adapters.methods import METHODS, Method, method
    from forcetune.adapters.updates import Dense, Frozen, Gate, LowRank
    from forcetune.backbones.loading import load
    from forcetune.config import RunConfig, load_config
    from forcetune.deployment.approximate import merge_approximately
    from forcetune.deployment.calculator import calculator
    from forcetune.deployment.export.exporting import export
    from forcetune.deployment.hub import Pushed, push
    from forcetune.deployment.merge import merge
    from forcetune.deployment.spins import exchange_parameters, relax_spins
    from forcetune.deployment.watch import ExtrapolationError, Watch, watch
    from forcetune.diagnostics.doctor import Checkup, doctor
    from forcetune.diagnostics.finding import Finding
    from forcetune.errors import ForcetuneError, ForcetuneWarning, InputError
    from forcetune.frames.read import read_frames
    from forcetune.runs.compare import compare
    from forcetune.runs.demo import Demo, demo_file
    from forcetune.runs.evaluate import evaluate, evaluate_ensemble, evaluate_uncertainty
    from forcetune.runs.fit import Run, fit, resume, run_fit
    from forcetune.runs.learn import Learned, learn
    from forcetune.runs.methods import compare_methods
    from forcetune.runs.select import select
    from forcetune.runs.uncertainty import calibrate

_HOMES = {
    "adapters.attach": ("Adapter", "attach", "detach", "disable_adapter"),
    "adapters.combine": ("Combination", "combine"),
    "adapters.file": ("load_adapter", "save_adapter"),
    "adapters.methods": ("METHODS", "Method", "method"),
    "adapters.updates": ("Dense", "Frozen", "Gate", "LowRank"),
    "runs.evaluate": ("evaluate", "evaluate_ensemble", "evaluate_uncertainty"),
    "runs.learn": ("Learned", "learn"),
    "runs.select": ("select",),
    "runs.uncertainty": ("calibrate",),
    "runs.methods": ("compare_methods",),
    "backbones.loading": ("load",),
    "diagnostics.doctor": ("Checkup", "doctor"),
    "runs.compare": ("compare",),
    "config": ("RunConfig", "load_config"),
    "runs.demo": ("Demo", "demo_file"),
    "deployment.approximate": ("merge_approximately",),
    "deployment.calculator": ("calculator",),
    "deployment.export.exporting": ("export",),
    "deployment.hub": ("Pushed", "push"),
    "deployment.merge": ("merge",),
    "deployment.watch": ("ExtrapolationError", "Watch", "watch"),
    "deployment.spins": ("exchange_parameters", "relax_spins"),
    "errors": ("ForcetuneError", "ForcetuneWarning", "InputError"),
    "runs.fit": ("Run", "fit", "resume", "run_fit"),
    "diagnostics.finding": ("Finding",),
    "frames.read": ("read_frames",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

_PROGRAMS = ("lammps", "openmm", "torchsim")
"""Modules for simulation programs, each of which needs a package of its own: `forcetune.torchsim` and so on."""

__all__ = [
    "METHODS",
    "Adapter",
    "Checkup",
    "Combination",
    "Demo",
    "Dense",
    "ExtrapolationError",
    "Finding",
    "ForcetuneError",
    "ForcetuneWarning",
    "Frozen",
    "Gate",
    "InputError",
    "Learned",
    "LowRank",
    "Method",
    "Pushed",
    "Run",
    "RunConfig",
    "Watch",
    "__version__",
    "attach",
    "calculator",
    "calibrate",
    "combine",
    "compare",
    "compare_methods",
    "demo_file",
    "detach",
    "disable_adapter",
    "doctor",
    "evaluate",
    "evaluate_ensemble",
    "evaluate_uncertainty",
    "exchange_parameters",
    "export",
    "fit",
    "learn",
    "load",
    "load_adapter",
    "load_config",
    "merge",
    "merge_approximately",
    "method",
    "push",
    "read_frames",
    "relax_spins",
    "resume",
    "run_fit",
    "save_adapter",
    "select",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``import forcetune`` is instant."""
    if name in _PROGRAMS:
        return import_module(f"forcetune.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'forcetune' has no attribute {name!r}")
    return getattr(import_module(f"forcetune.{_HOME_OF[name]}"), name)
