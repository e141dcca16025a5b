"""How the rows of an optimizer step are spread over ranks and micro-batches.

A run may go on with another spread as long as a step has the same rows: the order of the data says
nothing of ranks or batches, and a step divides its gradient by the tokens of all its rows.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer

from astrai_train.modules.base import LMModule


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The numbers whose product is the rows of an optimizer step."""

    devices: int
    """Ranks, of all nodes."""
    accumulate: int
    """Micro-batches of a step on each rank."""
    batch_size: int
    """Rows of a micro-batch; 1 where the data module has no such number."""
    repeats: int
    """How often a micro-batch is handed out, one time after the other."""

    @classmethod
    def of(
        cls, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None
    ) -> "Layout":
        """Return that of a run."""
        accumulate = trainer.accumulate_grad_batches
        return cls(
            devices=trainer.num_devices * trainer.num_nodes,
            accumulate=accumulate,
            batch_size=getattr(datamodule, "batch_size", 1),
            repeats=module.num_repeats(accumulate) if isinstance(module, LMModule) else 1,
        )

    @classmethod
    def saved(cls, entry: Any) -> "Layout":
        """Return that of a checkpoint's entry.

        Raises:
            ValueError: the checkpoint has none.
        """
        if entry is None:
            raise ValueError(
                "the checkpoint does not say how its rows were spread over ranks: it is of an "
                "earlier version. Begin with its weights by model.init_args.init_from, or start "
                "over with --fresh"
            )
        return cls(**entry)

    @property
    def rows(self) -> Fraction:
        """Rows of an optimizer step that no other step has."""
        return Fraction(self.batch_size * self.accumulate * self.devices, self.repeats)

    def refuse_other_rows(self, before: "Layout") -> None:
        """Let a run go on from another layout, or say why it cannot.

        Raises:
            ValueError: a step would have other rows than before.
        """
        if self.rows != before.rows:
            raise ValueError(
                f"the run had {before.rows} rows an optimizer step ({before}), and now it would "
                f"have {self.rows} ({self}). Its devices may change and its rows may not: let the "
                "product stay the same, choose another trainer.default_root_dir, or start over "
                "with --fresh"
            )

    def __str__(self) -> str:
        text = (
            f"data.batch_size {self.batch_size} x trainer.accumulate_grad_batches "
            f"{self.accumulate} x trainer.devices {self.devices}"
        )
        return text + (f" / {self.repeats} uses of each" if self.repeats > 1 else "")
