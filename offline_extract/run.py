"""The extractor: Task -> prompts -> relevance -> heads -> means -> Pack."""

import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fv_steer._version import __version__
from fv_steer.errors import BadInputError, TaskError, WeakPackError
from fv_steer.pack import Float32, Pack
from fv_steer.schema import (
    DatasetInfo,
    Evaluation,
    HeadSelection,
    Manifest,
    Measurement,
    Mode,
    PromptFormat,
    Recipe,
    Recommended,
    Source,
)
from offline_extract.collect import Progress, Samples, collect_samples, score_heads
from offline_extract.engine import LoadedModel, load_model
from offline_extract.heads import random_scores, top_heads
from offline_extract.measure import measure_source, measure_steered, zero_shot_prompts
from offline_extract.prompts import Context, Prompt
from offline_extract.settings import Choice, choose_settings, dfv, fv_at
from offline_extract.source import SHOTS, ChosenSource, TrainingWords, contexts_of, part_training, usable_sources
from offline_extract.tasks import Pair, Task, load_dataset, load_task, split, task_names, with_overrides

MAX_VALIDATION = 60
MAX_TEST = 200


@dataclass(frozen=True)
class ExtractSettings:
    """What `fv-steer extract` was asked for; None means `auto`."""

    model: str
    task: str
    dataset: Path | None = None
    instructions: tuple[tuple[str, str], ...] = ()
    source: Source | None = None
    format: PromptFormat = "qa"
    head_selection: HeadSelection = "lrp"
    heads_from: Literal["global", "task"] = "task"
    top_k: int | None = None
    scale: float | None = None
    samples: int = 100
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    allow_weak: bool = False


def extract(settings: ExtractSettings, progress: Progress) -> Pack:
    """Extract one pack and measure it on held-out words.

    Raises WeakPackError, unless weak packs are allowed, if the model cannot do
    the task or the pack does no better than random heads or no steering.
    """
    task = with_overrides(settings.task, settings.dataset, list(settings.instructions))
    progress("model", 0, 1)
    loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    progress("model", 1, 1)
    n_heads = loaded.info.n_layers * loaded.info.n_heads
    if settings.top_k is not None and not 1 <= settings.top_k <= n_heads:
        raise BadInputError(f"--top-k {settings.top_k} is out of range: the model has {n_heads} heads")
    words = split(task.pairs, settings.seed)
    training = part_training(words.train)
    validation = zero_shot_prompts(loaded, words.validation[:MAX_VALIDATION], settings.format)
    sources = usable_sources(loaded, task, training, wanted=settings.source, fmt=settings.format, seed=settings.seed)
    drafts = [_draft(loaded, source, training, validation, settings, progress) for source in sources]
    # max keeps the first of equals, and the sources come in the order of preference.
    best = max(drafts, key=lambda draft: draft.choice.quality)
    chosen, samples, scores, choice = best.source, best.samples, best.scores, best.choice
    evaluation = evaluate_arms(
        loaded, choice, samples.mean, chosen.contexts, words.test[:MAX_TEST], settings.format, settings.seed, progress
    )
    reason = _source_reason(best, drafts)
    pack = _assemble(loaded, task, settings, chosen, reason, samples, scores, choice, evaluation)
    if not settings.allow_weak:
        check_strength(pack)
    return pack


@dataclass(frozen=True)
class _Draft:
    """What one source gives, before held-out words are looked at."""

    source: ChosenSource
    samples: Samples
    scores: Float32
    choice: Choice


def _draft(
    loaded: LoadedModel,
    source: ChosenSource,
    training: TrainingWords,
    validation: Sequence[Prompt],
    settings: ExtractSettings,
    progress: Progress,
) -> _Draft:
    def report(stage: str, done: int, total: int) -> None:
        progress(f"{stage} ({source.source})", done, total)

    samples = collect_samples(
        loaded, source.contexts, training.queries, samples=settings.samples, fmt=settings.format, progress=report
    )
    scores = _scores(loaded, samples, settings, source.source, report)
    choice = choose_settings(
        loaded,
        scores,
        samples.mean,
        validation,
        top_k=settings.top_k,
        scale=settings.scale,
        fmt=settings.format,
        progress=report,
    )
    return _Draft(source, samples, scores, choice)


def _source_reason(best: _Draft, drafts: Sequence[_Draft]) -> str:
    """Why the source was chosen, for the user and the manifest."""
    qualities = ", ".join(f"{d.source.source} {d.choice.quality:.3f}" for d in drafts)
    return f"{best.source.reason}; steered quality on validation words: {qualities}; chose {best.source.source}"


def _scores(
    loaded: LoadedModel, samples: Samples, settings: ExtractSettings, source: Source, progress: Progress
) -> Float32:
    own = score_heads(
        loaded, samples, settings.head_selection, fmt=settings.format, seed=settings.seed, progress=progress
    )
    if settings.heads_from == "task" or settings.head_selection == "random":
        return own
    others = _scores_of_others(loaded, settings, source, progress)
    return np.stack([own, *others]).mean(axis=0).astype(np.float32)


def _scores_of_others(
    loaded: LoadedModel, settings: ExtractSettings, source: Source, progress: Progress
) -> list[Float32]:
    """Scores of every other built-in task the model gives right answers on, with the same source."""
    result = []
    for name in task_names():
        if name == settings.task:
            continue
        task = load_task(name)
        training = part_training(split(task.pairs, settings.seed).train)
        contexts = contexts_of(source, task, training, settings.seed)
        try:
            samples = collect_samples(
                loaded,
                contexts,
                training.queries[:40],
                samples=settings.samples,
                fmt=settings.format,
                progress=progress,
            )
        except WeakPackError:
            continue
        result.append(
            score_heads(
                loaded, samples, settings.head_selection, fmt=settings.format, seed=settings.seed, progress=progress
            )
        )
    return result


def evaluate_arms(
    loaded: LoadedModel,
    choice: Choice,
    mean: Float32,
    contexts: Sequence[Context],
    pairs: Sequence[Pair],
    fmt: PromptFormat,
    seed: int,
    progress: Progress,
) -> Evaluation:
    """Every arm on the same held-out words."""
    prompts = zero_shot_prompts(loaded, pairs, fmt)
    random_heads = top_heads(
        random_scores((loaded.info.n_layers, loaded.info.n_heads), seed, draw=1), len(choice.heads)
    )
    arms = {
        "unsteered": None,
        "dfv": dfv(mean, choice.heads, choice.scale),
        "fv": fv_at(choice.fv, choice.layer, choice.scale),
        "random_heads": dfv(mean, random_heads, choice.scale),
    }
    results: dict[str, Measurement] = {}
    for name, offsets in arms.items():
        results[name] = measure_steered(loaded, prompts, offsets, choice.apply, fmt)
        progress("evaluation", len(results), len(arms) + 1)
    results["source_prompt"] = measure_source(loaded, contexts, pairs, fmt)
    progress("evaluation", len(arms) + 1, len(arms) + 1)
    return Evaluation(n=len(pairs), **results)


def _assemble(
    loaded: LoadedModel,
    task: Task,
    settings: ExtractSettings,
    chosen: ChosenSource,
    reason: str,
    samples: Samples,
    scores: Float32,
    choice: Choice,
    evaluation: Evaluation,
) -> Pack:
    import transformers

    manifest = Manifest(
        name=task.name,
        task=task.name,
        description=task.description,
        model=loaded.info,
        recipe=Recipe(
            source=chosen.source,
            source_reason=reason,
            format=settings.format,
            instructions=[c.instruction for c in chosen.contexts if c.instruction],
            shots=SHOTS if chosen.source != "instruction" else 0,
            samples=samples.count,
            head_selection=settings.head_selection,
            heads_from=settings.heads_from,
            top_k=len(choice.heads),
            dtype=settings.dtype,
            seed=settings.seed,
            dataset=DatasetInfo(name=task.source, digest=task.digest, licence=task.licence),
        ),
        recommended=Recommended(mode="dfv", scale=choice.scale, apply=choice.apply, layer=choice.layer),
        evaluation=evaluation,
        versions={
            "fv-steer": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    return Pack(manifest=manifest, heads=choice.heads, mean=samples.mean, scores=scores, fv=choice.fv)


def check_strength(pack: Pack) -> None:
    """Raise WeakPackError if DFV is not above both controls' intervals."""
    result = pack.manifest.evaluation
    if result is None:
        return
    for control, measured in (("random heads", result.random_heads), ("no steering", result.unsteered)):
        if result.dfv.top1.value <= measured.top1.high:
            raise WeakPackError(
                f"the pack does no better than {control} on {result.n} held-out words: DFV top-1 "
                f"{result.dfv.top1.value:.2f}, {control} {measured.top1.value:.2f} "
                f"[{measured.top1.low:.2f}, {measured.top1.high:.2f}]. "
                "--allow-weak writes it all the same."
            )


def evaluate_pack(
    pack: Pack,
    model: str,
    *,
    dataset: Path | None = None,
    mode: Mode = "dfv",
    scale: float | None = None,
    top_k: int | None = None,
    device: str = "auto",
    progress: Progress,
) -> Evaluation:
    """Measure a pack again: on its task's own held-out words, or on all words of `dataset`."""
    from fv_steer.pack import check_fits
    from offline_extract.heads import function_vector

    recipe, recommended = pack.manifest.recipe, pack.manifest.recommended
    if dataset is None and pack.manifest.task not in task_names():
        raise TaskError(f"task {pack.manifest.task!r} is not built in: give its words with --dataset")
    pairs = load_dataset(dataset) if dataset else load_task(pack.manifest.task).pairs
    if dataset is None and load_task(pack.manifest.task).digest != recipe.dataset.digest:
        raise TaskError(
            f"the pack was extracted from other words than the built-in {pack.manifest.task!r} "
            "(digests differ), so its held-out words are not known: give --dataset"
        )
    loaded = load_model(model, device=device, dtype=recipe.dtype)
    check_fits(pack, loaded.info)
    n_heads = pack.scores.size
    if top_k is not None and not 1 <= top_k <= n_heads:
        raise BadInputError(f"--top-k {top_k} is out of range: the model has {n_heads} heads")
    heads = pack.heads if top_k is None else top_heads(pack.scores, top_k)
    choice = Choice(
        heads,
        recommended.scale if scale is None else scale,
        recommended.layer,
        recommended.apply,
        pack.fv if top_k is None else function_vector(loaded, heads, pack.mean),
        quality=0.0,
    )
    words = split(pairs, recipe.seed)
    task = Task(pack.manifest.task, "", "", "", tuple(recipe.instructions), pairs)
    contexts = contexts_of(recipe.source, task, part_training(words.train), recipe.seed)
    held_out = pairs if dataset else words.test
    return evaluate_arms(loaded, choice, pack.mean, contexts, held_out[:MAX_TEST], recipe.format, recipe.seed, progress)
