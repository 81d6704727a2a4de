"""The values a task consists of, and its split into train, validation and test."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from fv_steer.pack import canonical_json
from fv_steer.schema import FramedInstruction

TRAIN_FRACTION = 0.35
VALIDATION_FRACTION = 0.25


@dataclass(frozen=True)
class Pair:
    """An input and every output accepted for it; the first is the canonical one."""

    input: str
    outputs: tuple[str, ...]

    @property
    def target(self) -> str:
        """The canonical output."""
        return self.outputs[0]


@dataclass(frozen=True)
class Task:
    """A named mapping from inputs to outputs, with the instructions that ask for it."""

    name: str
    description: str
    source: str
    licence: str
    instructions: tuple[FramedInstruction, ...]
    pairs: tuple[Pair, ...]

    @property
    def digest(self) -> str:
        """Sha256 hex over the canonical pairs, in their order."""
        return hashlib.sha256(canonical_json([[p.input, list(p.outputs)] for p in self.pairs])).hexdigest()


@dataclass(frozen=True)
class Split:
    """Disjoint parts of a task's pairs."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


def split(pairs: Sequence[Pair], seed: int) -> Split:
    """Shuffle and divide `pairs` 35/25/40; the test part takes what rounding leaves over.

    The result depends on the pairs, their order and `seed` only. Pairs have unique
    inputs, as every loader here ensures, so no input falls in two parts.
    """
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    train = int(len(shuffled) * TRAIN_FRACTION)
    held = train + int(len(shuffled) * VALIDATION_FRACTION)
    return Split(tuple(shuffled[:train]), tuple(shuffled[train:held]), tuple(shuffled[held:]))
