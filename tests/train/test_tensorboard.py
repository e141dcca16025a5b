from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from astrai_train.tensorboard import go_on


def write(logger: TensorBoardLogger, steps: range, value: float) -> None:
    for step in steps:
        logger.log_metrics({"loss": value}, step)
    logger.finalize("success")


def test_steps_that_are_done_again_are_shown_once(tmp_path):
    write(TensorBoardLogger(tmp_path), range(6), 1.0)
    again = TensorBoardLogger(tmp_path)
    go_on(again, 3)
    write(again, range(3, 8), 2.0)
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    shown = EventAccumulator(str(folder)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in shown] == [
        *[(step, 1.0) for step in range(3)],
        *[(step, 2.0) for step in range(3, 8)],
    ]
