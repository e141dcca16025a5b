"""TensorBoard of a run that was interrupted: one curve, whatever interrupted it."""

# Lightning takes the version and the first step when a logger is made, before a run is known
# pyright: reportPrivateUsage=false

from lightning.pytorch.loggers import TensorBoardLogger


def go_on(logger: TensorBoardLogger, step: int) -> None:
    """Let a logger write where the run wrote before, and hide what it will write again.

    Args:
        logger: one that has written nothing yet.
        step: optimizer steps done; what is logged carries the steps done before its own.
    """
    if logger._version is None:
        logger._version = max(logger._get_next_version() - 1, 0)
    logger._kwargs.setdefault("purge_step", step)
