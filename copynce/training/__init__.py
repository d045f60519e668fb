"""Training: settings, the trainer, the process group, checkpoints and the log."""

from copynce.config import load_config
from copynce.errors import ConfigError, RunError, TrainingError
from copynce.training.checkpoints import checkpoints, find_model
from copynce.training.config import DataConfig, LossConfig, OptimConfig, TrainConfig
from copynce.training.log import read_log
from copynce.training.trainer import DescriptorObjective, train

__all__ = [
    "ConfigError",
    "DataConfig",
    "DescriptorObjective",
    "LossConfig",
    "OptimConfig",
    "RunError",
    "TrainConfig",
    "TrainingError",
    "checkpoints",
    "find_model",
    "load_config",
    "read_log",
    "train",
]
