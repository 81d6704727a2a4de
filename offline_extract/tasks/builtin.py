"""The tasks that come with fv-steer, and a user's changes to them."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from fv_steer.errors import TaskError
from fv_steer.schema import FramedInstruction
from offline_extract.tasks.dataset import load_dataset
from offline_extract.tasks.model import Pair, Task

_DATA = resources.files("offline_extract.tasks") / "data"


def task_names() -> list[str]:
    """Names of the built-in tasks, sorted."""
    return sorted(entry.name.removesuffix(".json") for entry in _DATA.iterdir() if entry.name.endswith(".json"))


def load_task(name: str) -> Task:
    """Load a built-in task; raises TaskError naming the known tasks if there is no such one."""
    known = task_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise TaskError(f"unknown task {name!r}{hint}; built-in tasks: {', '.join(known)}; any other needs a dataset")
    data = json.loads((_DATA / f"{name}.json").read_text(encoding="utf-8"))
    return Task(
        name=data["name"],
        description=data["description"],
        source=data["source"],
        licence=data["licence"],
        instructions=tuple(_framed(item["text"], item["frame"]) for item in data["instructions"]),
        # A pair is [input, canonical output, further accepted outputs...].
        pairs=tuple(Pair(word, tuple(outputs)) for word, *outputs in data["pairs"]),
    )


def with_overrides(task_name: str, dataset: Path | None = None, instructions: Sequence[tuple[str, str]] = ()) -> Task:
    """A built-in task with the user's own pairs, own (text, frame) instructions, or both.

    A name that is not built in makes a new task, which needs a dataset and may have no
    instructions. Raises TaskError if it has none, or if a frame is not in its instruction.
    """
    own = tuple(_framed(text, frame) for text, frame in instructions)
    if dataset is None or task_name in task_names():
        task = load_task(task_name)
    else:
        if not task_name.strip():
            raise TaskError("the task needs a name")
        task = Task(task_name, f"The task of {dataset.name}.", "", "", (), ())
    if dataset is not None:
        task = replace(task, pairs=load_dataset(dataset), source=dataset.name, licence="user-supplied")
    return replace(task, instructions=own) if own else task


def _framed(text: str, frame: str) -> FramedInstruction:
    if not text.strip():
        raise TaskError("an instruction is empty")
    if not frame.strip():
        raise TaskError(f"the instruction {text!r} has an empty frame; name the words that carry the task")
    if frame not in text:
        raise TaskError(f"the frame {frame!r} is not part of its instruction {text!r}")
    return FramedInstruction(text=text, frame=frame)
