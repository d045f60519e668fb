"""Training: settings, the trainer, the process group, checkpoints and the log."""

from copynce.config import load_config
from copynce.errors import ConfigError, RunError, Stopped, TrainingError
from copynce.training.checkpoints import checkpoints, find_model
from copynce.training.config import DataConfig, LossConfig, OptimConfig, TrainConfig
from copynce.training.log import read_events, read_log
from copynce.training.trainer import DescriptorObjective, train

__all__ = [
    "ConfigError",
    "DataConfig",
    "DescriptorObjective",
    "LossConfig",
    "OptimConfig",
    "RunError",
    "Stopped",
    "TrainConfig",
    "TrainingError",
    "checkpoints",
    "find_model",
    "load_config",
    "read_events",
    "read_log",
    "train",
]
