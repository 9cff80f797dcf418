"""What a Trainer may carry beside the modules: checkpoints, export, samples, monitors, history, throughput, a bar."""

from rlhf_lightning.callbacks.checkpoint import ResumeCheckpoint
from rlhf_lightning.callbacks.checkpoint_file import AtomicCheckpointIO, checkpoints, newest_whole
from rlhf_lightning.callbacks.export import HuggingFaceExport
from rlhf_lightning.callbacks.history import History
from rlhf_lightning.callbacks.progress import ProgressBar
from rlhf_lightning.callbacks.resume import ExactResume
from rlhf_lightning.callbacks.rollouts import RolloutModule, SampleTable, ScoreMonitor
from rlhf_lightning.callbacks.throughput import MeasuredModule, Throughput
from rlhf_lightning.callbacks.tracking import log_figures, log_headline

__all__ = [
    "AtomicCheckpointIO",
    "ExactResume",
    "History",
    "HuggingFaceExport",
    "MeasuredModule",
    "ProgressBar",
    "ResumeCheckpoint",
    "RolloutModule",
    "SampleTable",
    "ScoreMonitor",
    "Throughput",
    "checkpoints",
    "log_figures",
    "log_headline",
    "newest_whole",
]
