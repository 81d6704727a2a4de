"""Accuracy of prompts and of steering, with intervals."""

from collections.abc import Iterable, Sequence
from typing import Any

from scipy.stats import binomtest

from fv_steer.schema import Apply, Measurement, PromptFormat, Score
from fv_steer.steer import Offsets, steered
from offline_extract.engine import LoadedModel, generate, last_logits, zero_shot_logits
from offline_extract.prompts import ZERO_SHOT, Context, Prompt, build_prompt, first_answer_token
from offline_extract.tasks import Pair

BATCH = 32


def chunks(items: Sequence[Any], size: int = BATCH) -> Iterable[Sequence[Any]]:
    """Consecutive slices of at most `size`."""
    return (items[i : i + size] for i in range(0, len(items), size))


def score(hits: Sequence[bool]) -> Score:
    """Proportion with its 95% Wilson interval."""
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    clamp = [min(1.0, max(0.0, round(float(v), 6))) for v in (sum(hits) / len(hits), interval.low, interval.high)]
    return Score(value=clamp[0], low=clamp[1], high=clamp[2])


def zero_shot_prompts(loaded: LoadedModel, pairs: Sequence[Pair], fmt: PromptFormat) -> list[Prompt]:
    """The query alone, for each pair."""
    return [build_prompt(loaded.tokenizer, ZERO_SHOT, pair, fmt) for pair in pairs]


def accepted_tokens(loaded: LoadedModel, pair: Pair, fmt: PromptFormat) -> set[int]:
    """First tokens of every accepted answer."""
    space = " " if fmt == "qa" else ""
    return {first_answer_token(loaded.tokenizer, space + output) for output in pair.outputs}


def prompt_hits(loaded: LoadedModel, prompts: Sequence[Prompt], fmt: PromptFormat) -> list[bool]:
    """Whether the top-1 next token starts an accepted answer; prompts should share a context."""
    tops = [t for part in chunks(prompts) for t in last_logits(loaded, [p.ids for p in part]).argmax(-1).tolist()]
    return [top in accepted_tokens(loaded, p.pair, fmt) for top, p in zip(tops, prompts, strict=True)]


def steered_hits(
    loaded: LoadedModel, prompts: Sequence[Prompt], offsets: Offsets | None, fmt: PromptFormat
) -> list[bool]:
    """As `prompt_hits`, for zero-shot prompts steered at the query position."""
    tops = [
        t
        for part in chunks(prompts, 128)
        for t in zero_shot_logits(loaded, [p.ids for p in part], offsets).argmax(-1).tolist()
    ]
    return [top in accepted_tokens(loaded, p.pair, fmt) for top, p in zip(tops, prompts, strict=True)]


def steered_quality(
    loaded: LoadedModel, prompts: Sequence[Prompt], offsets: Offsets | None, fmt: PromptFormat
) -> float:
    """What settings are chosen by: the mean of top-1 accuracy and of the target's probability.

    On some fifty words many settings tie in accuracy; the probability tells a
    safe one from one that is about to fail.
    """
    total = 0.0
    for part in chunks(prompts, 128):
        probabilities = zero_shot_logits(loaded, [p.ids for p in part], offsets).softmax(-1)
        for row, prompt in zip(probabilities, part, strict=True):
            total += float(row[prompt.target]) + (int(row.argmax()) in accepted_tokens(loaded, prompt.pair, fmt))
    return round(total / (2 * len(prompts)), 6)


def answer_hits(
    loaded: LoadedModel, prompts: Sequence[Prompt], offsets: Offsets | None = None, apply: Apply = "last"
) -> list[bool]:
    """Whether the whole greedy answer, up to its first line break, is an accepted one."""
    tokenizer = loaded.tokenizer
    longest = max(
        len(tokenizer(f" {o}", add_special_tokens=False)["input_ids"]) for p in prompts for o in p.pair.outputs
    )
    hits = []
    for part in chunks(prompts):
        with steered(loaded.model, offsets or Offsets({}, {}), apply):
            answers = generate(loaded, [p.ids for p in part], longest + 2)
        for prompt, answer in zip(part, answers, strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True).strip()
            hits.append(text.split("\n")[0].strip() in prompt.pair.outputs)
    return hits


def measure_steered(
    loaded: LoadedModel, prompts: Sequence[Prompt], offsets: Offsets | None, apply: Apply, fmt: PromptFormat
) -> Measurement:
    """First-token and whole-answer accuracy of a zero-shot arm."""
    return Measurement(
        top1=score(steered_hits(loaded, prompts, offsets, fmt)),
        exact=score(answer_hits(loaded, prompts, offsets, apply)),
    )


def measure_source(
    loaded: LoadedModel, contexts: Sequence[Context], pairs: Sequence[Pair], fmt: PromptFormat
) -> Measurement:
    """Accuracy of the source prompt; the words are dealt out over its contexts in turn."""
    top1: list[bool] = []
    exact: list[bool] = []
    for index, context in enumerate(contexts):
        dealt = pairs[index :: len(contexts)]
        if dealt:
            prompts = [build_prompt(loaded.tokenizer, context, pair, fmt) for pair in dealt]
            top1 += prompt_hits(loaded, prompts, fmt)
            exact += answer_hits(loaded, prompts)
    return Measurement(top1=score(top1), exact=score(exact))
