"""Tasks: word pairs and the instructions that ask for them."""

from fv_steer.schema import FramedInstruction
from offline_extract.tasks.builtin import load_task, task_names, with_overrides
from offline_extract.tasks.dataset import MIN_PAIRS, load_dataset
from offline_extract.tasks.model import Pair, Split, Task, split

__all__ = [
    "MIN_PAIRS",
    "FramedInstruction",
    "Pair",
    "Split",
    "Task",
    "load_dataset",
    "load_task",
    "split",
    "task_names",
    "with_overrides",
]
