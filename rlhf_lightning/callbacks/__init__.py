"""What a Trainer may carry beside the modules: export, sample tables, monitors, history."""

from rlhf_lightning.callbacks.export import HuggingFaceExport
from rlhf_lightning.callbacks.history import History
from rlhf_lightning.callbacks.rollouts import RolloutModule, SampleTable, ScoreMonitor
from rlhf_lightning.callbacks.tracking import log_figures, log_headline

__all__ = [
    "History",
    "HuggingFaceExport",
    "RolloutModule",
    "SampleTable",
    "ScoreMonitor",
    "log_figures",
    "log_headline",
]
