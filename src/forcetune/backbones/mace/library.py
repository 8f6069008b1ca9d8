"""The one place that imports mace-torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from types import ModuleType

import torch

from forcetune.errors import InputError


def import_mace() -> ModuleType:
    """Import ``mace.modules`` quietly.

    e3nn reads its own constants by ``torch.load`` when imported, which newer torch refuses unless ``slice`` is
    allowed. Importing mace makes ``torch.load`` unsafe by default for the whole process (it sets
    ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD``, which its calculator needs); forcetune never relies on that default.

    TorchScript is set to fuse nothing in this process: it would fuse after the first calls, a fused kernel rounds
    differently, and a resumed run would not be equal to one that was left in peace.

    Raises:
        InputError: mace-torch is not installed.
    """
    torch.serialization.add_safe_globals([slice])
    torch.jit.set_fusion_strategy([("STATIC", 0), ("DYNAMIC", 0)])
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # notes on optional accelerators that are not installed
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import mace.modules
            import mace.modules.symmetric_contraction
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; install forcetune with the extra: pip install 'forcetune[mace]'."
        ) from error
    finally:
        logging.disable(level)
    return mace.modules
