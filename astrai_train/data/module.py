"""The data of a run, as Lightning and the YAML see it."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import lightning as L

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.datasets import SEQDataset, SFTDataset, TooLong
from astrai_train.data.loader import ResumableLoader
from astrai_train.data.mixture import Mixture
from astrai_train.data.pairs import DPODataset
from astrai_train.data.prompts import GRPODataset
from astrai_train.data.record import Stage
from astrai_train.data.sampler import ResumableDistributedSampler
from astrai_train.data.storage import open_storage
from astrai_train.data.tokenizing import Answers, end_of_text_id

Dataset = SEQDataset | SFTDataset | DPODataset | GRPODataset | Mixture


class TokenDataModule(L.LightningDataModule):
    """Batches of tokens for every stage, from prepared files or from records.

    Args:
        tokenizer: Folder of the tokenizer, written by `astrai-data tokenizer` or a model folder.
        train: Files to train on: .h5 of `astrai-data prepare`, or .jsonl, .json or .txt, which are
            tokenised at each start. Several are read as one.
        val: Files to validate on; null for none.
        test: Files that `astrai-train test` measures.
        predict: Files that `astrai-train predict` runs over.
        weights: The share that each of several train files has in an epoch, in any unit: the
            largest for its share is gone through once, the others repeat. Null takes every file
            once.
        stride: In seq the tokens from the start of a row to that of the next; null is window_size.
            A smaller one makes rows overlap: training repeats what they share, evaluation counts
            it once and reads it as context.
        stage: seq learns all tokens of documents, sft the answers of conversations, dpo to prefer
            one answer to another, grpo from rewards.
        window_size: Tokens of a row; documents are packed into rows without seeing each other. In
            dpo and grpo the most tokens of a prompt with its answer.
        batch_size: Rows of a micro-batch; pairs in dpo, prompts in grpo.
        num_workers: Processes that build batches; 0 builds them in the training process.
        seed: Of the order of rows, which also depends on the epoch.
        too_long: Whether a sample longer than window_size is refused, or dropped with a warning;
            seq cuts documents instead.
        answers: Whether sft teaches all answers of a conversation or its last one; files of
            `astrai-data prepare` have this settled.
    """

    def __init__(
        self,
        tokenizer: Path,
        train: list[Path] | Path,
        val: list[Path] | Path | None = None,
        stage: Stage = "seq",
        window_size: int = 512,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        too_long: TooLong = "refuse",
        answers: Answers = "all",
        test: list[Path] | Path | None = None,
        predict: list[Path] | Path | None = None,
        weights: list[float] | None = None,
        stride: int | None = None,
    ) -> None:
        # files are list[Path] | Path in this order: the other way round jsonargparse writes a
        # list into config.yaml as the text of its repr, which no later run can read
        super().__init__()
        least = {"window_size": (window_size, 2), "batch_size": (batch_size, 1)}
        for name, (value, lowest) in (least | {"num_workers": (num_workers, 0)}).items():
            if value < lowest:
                raise ValueError(f"data.{name} must be at least {lowest}, not {value}")
        if stride is not None and (stage != "seq" or not 0 < stride <= window_size):
            raise ValueError(
                f"data.stride {stride} must be from 1 to window_size {window_size}, in stage seq"
            )
        self._stride = stride
        self._weights = weights
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.stage: Stage = stage
        self.window_size = window_size
        self.batch_size = batch_size
        self.repeats = 1
        """How often training is handed each batch; an objective says so in its `setup`."""
        self._num_workers = num_workers
        self._seed = seed
        self._train = _as_list(train)
        self._val = _as_list(val)
        self._test = _as_list(test)
        self._predict = _as_list(predict)
        self._too_long: TooLong = too_long
        self._answers: Answers = answers

    @cached_property
    def train_dataset(self) -> Dataset:
        """The rows to train on."""
        if self._weights is None:
            return self._dataset(self._train, is_training=True)
        sources = [self._dataset([file], is_training=True) for file in self._train]
        return Mixture(sources, self._weights)

    @cached_property
    def val_dataset(self) -> Dataset | None:
        """The rows to validate on."""
        return self._dataset(self._val) if self._val else None

    @cached_property
    def test_dataset(self) -> Dataset:
        """The rows of `astrai-train test`.

        Raises:
            ValueError: no file is named for it.
        """
        return self._dataset(self._named("test", self._test))

    @cached_property
    def predict_dataset(self) -> Dataset:
        """The rows of `astrai-train predict`.

        Raises:
            ValueError: no file is named for it.
        """
        return self._dataset(self._named("predict", self._predict))

    @property
    def num_train_batches(self) -> int:
        """Micro-batches of an epoch on each rank; known before the trainer builds loaders."""
        return len(self._loader(self.train_dataset, shuffle=True))

    def setup(self, stage: str) -> None:
        """Open what is needed, so that mistakes in it are found before anything else starts."""
        if stage == "fit":
            _ = self.train_dataset
        elif stage == "test":
            _ = self.test_dataset
        elif stage == "predict":
            _ = self.predict_dataset
        if self.val_dataset is None and self.trainer is not None:
            self.trainer.limit_val_batches = 0  # Lightning warns of an empty list

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches, saved with checkpoints."""
        return self._loader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Batches in order; an empty list skips validation."""
        dataset = self.val_dataset
        return [] if dataset is None else self._loader(dataset, shuffle=False)

    def test_dataloader(self) -> ResumableLoader:
        """Batches in order."""
        return self._loader(self.test_dataset, shuffle=False)

    def predict_dataloader(self) -> ResumableLoader:
        """Batches in order."""
        return self._loader(self.predict_dataset, shuffle=False)

    def _named(self, option: str, files: list[Path]) -> list[Path]:
        if not files:
            raise ValueError(
                f"data.{option} names no file: set it, say --data.init_args.{option} held_out.jsonl"
            )
        return files

    def _loader(self, dataset: Dataset, shuffle: bool) -> ResumableLoader:
        trainer = self.trainer
        sampler = ResumableDistributedSampler(
            len(dataset),
            seed=self._seed,
            shuffle=shuffle,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        repeats = self.repeats if shuffle else 1
        return ResumableLoader(dataset, sampler, self.batch_size, self._num_workers, repeats)

    def _dataset(self, files: Sequence[Path], is_training: bool = False) -> Dataset:
        storage = open_storage(
            files, stage=self.stage, tokenizer=self.tokenizer, answers=self._answers
        )
        padding = end_of_text_id(self.tokenizer)
        window, too_long = self.window_size, self._too_long
        match self.stage:
            case "seq":
                return SEQDataset(storage, window, padding, self._stride, not is_training)
            case "sft":
                return SFTDataset(storage, window, padding, too_long)
            case "dpo":
                return DPODataset(storage, window, padding, too_long)
            case "grpo":
                return GRPODataset(storage, window, padding, too_long)


def _as_list(files: list[Path] | Path | None) -> list[Path]:
    if files is None:
        return []
    return [files] if isinstance(files, Path) else list(files)
