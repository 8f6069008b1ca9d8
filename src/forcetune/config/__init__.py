"""The run configuration: every option once, shared by YAML, command line and Python.

All models are frozen and refuse unknown keys, so a mistyped option is an error and never silently ignored.
"""

from forcetune.config.data import DataConfig, ModelConfig, ReferenceConfig, ReplayConfig
from forcetune.config.learn import LearnConfig
from forcetune.config.load import load_config, parse_setting
from forcetune.config.method import LARGEST_CHANNELS, LARGEST_RANK, Layer, MagnetismConfig, MethodConfig, SpinInputs
from forcetune.config.run import OutputConfig, RunConfig
from forcetune.config.section import LARGEST_SEED, Section, as_word, explain
from forcetune.config.training import (
    SCHEDULE_FREE,
    LossConfig,
    PenaltyConfig,
    ScheduleConfig,
    SecondStageConfig,
    SecondStageLossConfig,
    TrainingConfig,
)

__all__ = [
    "LARGEST_CHANNELS",
    "LARGEST_RANK",
    "LARGEST_SEED",
    "SCHEDULE_FREE",
    "DataConfig",
    "Layer",
    "LearnConfig",
    "LossConfig",
    "MagnetismConfig",
    "MethodConfig",
    "ModelConfig",
    "OutputConfig",
    "PenaltyConfig",
    "ReferenceConfig",
    "ReplayConfig",
    "RunConfig",
    "ScheduleConfig",
    "SecondStageConfig",
    "SecondStageLossConfig",
    "Section",
    "SpinInputs",
    "TrainingConfig",
    "as_word",
    "explain",
    "load_config",
    "parse_setting",
]
