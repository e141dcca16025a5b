"""Prompts to answer, or answers with rewards that are stored: stage grpo.

A batch of prompts alone is what rollouts start from, in plain Python:

    prompts     list of token ids, each ending where the answer begins
    columns     list of dicts: what reward functions are told, the record's `prompt` among it
    indices     list of each prompt's number in the data; with the run's seed and step it seeds
                its rollouts

A batch of stored responses is packed, S sequences in R rows of T positions:

    input_ids, labels, position_ids    (R, T) as for every stage, see `packing`
    document_ids                       (R, T) number of the sequence
    rewards, groups                    (S,) float32 and int64: its reward, and its prompt's place
                                       in the batch
    indices                            (G,) each group's prompt, by number
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from astrai_train.data.datasets import NumberedDataset, TooLong, fitting
from astrai_train.data.packing import batch_rows
from astrai_train.data.ragged import Array
from astrai_train.data.storage import Storage


@dataclass(frozen=True, kw_only=True)
class PromptItem:
    """One record: its prompt, or its prompt with each stored response."""

    number: int
    sequences: list[tuple[Array, Array]]
    """Token ids and which of them are taught."""
    columns: dict[str, Any]


class GRPODataset(NumberedDataset):
    """Prompts by number.

    Args:
        storage: the samples; all records have responses, or none has.
        window_size: the most tokens of a prompt, or of a prompt with its response.
        padding_id: the token in positions that hold none.
        too_long: what to do with a prompt that has more.

    Raises:
        ValueError: a prompt is too long and is to be refused, or some records have responses and
            others none; says file and line.
    """

    def __init__(
        self, storage: Storage, window_size: int, padding_id: int, too_long: TooLong = "refuse"
    ) -> None:
        assert storage.stage == "grpo"
        self.storage = storage
        self.padding_id = padding_id
        starts = storage.record_starts
        self._bounds = np.append(starts, len(storage))
        counts = np.diff(self._bounds)
        self.is_stored = bool(counts[0] > 1)
        """Whether records hold responses and rewards."""
        others = np.flatnonzero((counts > 1) != self.is_stored)
        if len(others):
            raise ValueError(
                f"{storage.place(0)} has {'' if self.is_stored else 'no '}responses, but "
                f"{storage.place(int(starts[others[0]]))} has "
                f"{'none' if self.is_stored else 'some'}: keep prompts with stored responses and "
                "prompts without in files of their own"
            )
        longest = np.maximum.reduceat(storage.input_ids.lengths, starts)
        self.prompts = fitting(storage, longest, starts, window_size, too_long)
        """The records that are no longer than the window."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number: int | None) -> PromptItem | None:
        if number is None:
            return None
        record = int(self.prompts[number])
        first, end = int(self._bounds[record]), int(self._bounds[record + 1])
        ids, trained = self.storage.input_ids, self.storage.trained
        return PromptItem(
            number=record,
            sequences=[(ids[sample], trained[sample]) for sample in range(first, end)],
            columns=json.loads(self.storage.columns["columns"][first].tobytes()),
        )

    def place(self, number: int) -> str:
        """Where a prompt came from: file and line."""
        return self.storage.place(int(self._bounds[self.prompts[number]]))

    def collate(self, items: list[PromptItem | None]) -> dict[str, Any]:
        """The batch of some prompts; None is left out."""
        prompts = [item for item in items if item is not None]
        if self.is_stored:
            return self._stored_batch(prompts)
        return {
            "prompts": [item.sequences[0][0].tolist() for item in prompts],
            "columns": [item.columns for item in prompts],
            "indices": [item.number for item in prompts],
        }

    def _stored_batch(self, groups: list[PromptItem]) -> dict[str, Tensor]:
        rows = batch_rows([one for group in groups for one in group.sequences], self.padding_id)
        batch = {name: torch.from_numpy(values) for name, values in rows.items()}
        rewards = [float(reward) for group in groups for reward in group.columns["rewards"]]
        batch["rewards"] = torch.tensor(rewards, dtype=torch.float32)
        sizes = torch.tensor([len(group.sequences) for group in groups], dtype=torch.int64)
        batch["groups"] = torch.arange(len(groups)).repeat_interleave(sizes)
        batch["indices"] = torch.tensor([group.number for group in groups], dtype=torch.int64)
        return batch
