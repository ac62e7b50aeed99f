"""Configuration: the network (WanConfig), what is computed (RolloutConfig), how it runs (ExecutionConfig). No torch."""

from .execution import ExecutionConfig
from .flow_schedule import TRAIN_TIMESTEPS, FlowSchedule, sigma_table
from .rollout import RolloutConfig
from .wan import SHIPPED, WAN, WanConfig, WanVideo, no_folder

__all__ = [
    "SHIPPED",
    "TRAIN_TIMESTEPS",
    "WAN",
    "ExecutionConfig",
    "FlowSchedule",
    "RolloutConfig",
    "WanConfig",
    "WanVideo",
    "no_folder",
    "sigma_table",
]
