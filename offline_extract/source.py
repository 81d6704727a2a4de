"""Which kind of prompt the model can do the task with, screened on training words."""

from collections.abc import Sequence
from dataclasses import dataclass

from fv_steer.errors import WeakPackError
from fv_steer.schema import PromptFormat, Source
from offline_extract.engine import LoadedModel
from offline_extract.measure import prompt_hits
from offline_extract.prompts import Context, build_prompt, make_contexts
from offline_extract.tasks import Pair, Task

N_CONTEXTS = 5
SHOTS = 10
#: A source is usable from this many rank-1 successes on (paper, section 4: 20 per instruction).
MIN_SUCCESSES = 20
_SCREENED_PER_CONTEXT = 12
#: A source is worth extracting from if its accuracy is at least this share of the best one's.
_NEAR_BEST = 0.8

ORDER: tuple[Source, ...] = ("instruction", "instruction+icl", "icl")


@dataclass(frozen=True)
class TrainingWords:
    """Training words, parted so that no query is ever among its own examples."""

    shots: tuple[Pair, ...]
    queries: tuple[Pair, ...]


def part_training(pairs: Sequence[Pair]) -> TrainingWords:
    """The first third (at most 40) are for examples, the rest for queries."""
    cut = min(40, len(pairs) // 3)
    return TrainingWords(tuple(pairs[:cut]), tuple(pairs[cut:]))


@dataclass(frozen=True)
class ChosenSource:
    """A source, its contexts, its accuracy on the screened words, and what the screening found."""

    source: Source
    contexts: tuple[Context, ...]
    accuracy: float
    reason: str


def contexts_of(source: Source, task: Task, words: TrainingWords, seed: int) -> tuple[Context, ...]:
    """The contexts a source runs its samples in."""
    return tuple(make_contexts(source, task.instructions, words.shots, shots=SHOTS, count=N_CONTEXTS, seed=seed))


def usable_sources(
    loaded: LoadedModel, task: Task, words: TrainingWords, *, wanted: Source | None, fmt: PromptFormat, seed: int
) -> list[ChosenSource]:
    """Screen one source, or (None) all that the task allows, on training words; those worth extracting from.

    Raises WeakPackError if the model does the task with none of them.
    """
    candidates: Sequence[Source] = (wanted,) if wanted else ORDER if task.instructions else ("icl",)
    screened: list[tuple[float, int, Source, tuple[Context, ...]]] = []
    for source in candidates:
        contexts = contexts_of(source, task, words, seed)
        hits: list[bool] = []
        for context in contexts:
            queries = words.queries[:_SCREENED_PER_CONTEXT]
            hits += prompt_hits(loaded, [build_prompt(loaded.tokenizer, context, q, fmt) for q in queries], fmt)
        screened.append((sum(hits) / len(hits), sum(hits), source, contexts))
    found = ", ".join(f"{s[2]} {s[0]:.2f}" for s in screened)
    usable = [s for s in screened if s[1] >= MIN_SUCCESSES]
    if not usable:
        raise WeakPackError(
            f"{loaded.info.id} cannot do {task.name!r}: top-1 accuracy on training words is {found}; "
            f"at least {MIN_SUCCESSES} successes are needed. Try a larger model or better instructions."
        )
    enough = _NEAR_BEST * max(s[0] for s in usable)
    return [
        ChosenSource(source, contexts, accuracy, f"source prompts on training words, top-1: {found}")
        for accuracy, _, source, contexts in usable
        if accuracy >= enough
    ]
