"""Lightning's progress bar, where training ends after a number of steps."""

from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Rich's bar, which names a last epoch only where there is one: not with ``max_epochs=None`` and ``max_steps``."""

    def __init__(self, refresh_rate: int = 10) -> None:
        """Update the bar every ``refresh_rate`` steps: an update takes as long as a step of a small network."""
        super().__init__(refresh_rate=refresh_rate)

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs != -1:
            return super()._get_train_description(current_epoch)
        return f"Epoch {current_epoch}".ljust(len(self.validation_description))
