"""A bilingual curriculum of chats that the project generates itself, each with a checker."""

from astrai_train.data.curriculum.checker import check
from astrai_train.data.curriculum.generator import CLOSED_TASKS, TASKS, WEIGHTS, generate, mixture
from astrai_train.data.curriculum.item import Item, Split
from astrai_train.data.curriculum.preferences import pairs, write_pairs
from astrai_train.data.curriculum.write import VAL_PER_TASK, write_curriculum

__all__ = [
    "CLOSED_TASKS",
    "TASKS",
    "VAL_PER_TASK",
    "WEIGHTS",
    "Item",
    "Split",
    "check",
    "generate",
    "mixture",
    "pairs",
    "write_curriculum",
    "write_pairs",
]
