"""Training: settings, the trainer, the process group, checkpoints and the log."""

from copynce.training.checkpoints import RunError, checkpoints, find_model
from copynce.training.config import ConfigError, DataConfig, LossConfig, OptimConfig, TrainConfig, load_config
from copynce.training.log import read_log
from copynce.training.trainer import DescriptorObjective, TrainingError, train

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
