"""What a finished run tells its loggers: the report's figures and headline numbers."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@rank_zero_only
def log_figures(loggers: Iterable[Logger], figures: Mapping[str, "Figure"], *, step: int = 0) -> None:
    """Send figures to the loggers that can show them, as ``report/<name>``; others are passed by."""
    for logger in loggers:
        for name, figure in figures.items():
            if isinstance(logger, WandbLogger):
                logger.log_image(f"report/{name}", [_pixels(figure)], step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(f"report/{name}", figure, step, close=False)


@rank_zero_only
def log_headline(loggers: Iterable[Logger], report: Mapping[str, Any], *, step: int = 0) -> None:
    """Send all single numbers of the report to every logger, as ``report/win_rate/ppo/mean``."""
    numbers = {f"report/{name}": value for name, value in leaves(report).items()}
    for logger in loggers:
        logger.log_metrics(numbers, step=step)
        logger.save()


def leaves(report: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Return the numbers of nested mappings by their path; lists (curves, samples, bins) are left out."""
    found: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, Mapping):
            found |= leaves(value, f"{path}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{path}{name}"] = float(value)
    return found


def _pixels(figure: "Figure") -> Any:
    """Return a figure as an RGB array (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
