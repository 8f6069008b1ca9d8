"""Every option of ``mace_run_train`` of mace-torch 0.3.16, and those that the MMEA repository adds."""

from __future__ import annotations

from forcetune.cli.mace_train.data_options import DATA_OPTIONS
from forcetune.cli.mace_train.network_options import NETWORK_OPTIONS
from forcetune.cli.mace_train.training_options import TRAINING_OPTIONS

MACE_VERSION = "0.3.16"
OPTIONS = (*DATA_OPTIONS, *NETWORK_OPTIONS, *TRAINING_OPTIONS)
BY_NAME = {option.name: option for option in OPTIONS}
