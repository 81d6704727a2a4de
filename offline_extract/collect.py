"""The samples a pack is made from: mean head outputs and head scores over successful prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fv_steer.errors import BadInputError, WeakPackError
from fv_steer.pack import Float32
from fv_steer.schema import HeadSelection, PromptFormat
from offline_extract.aie import indirect_effect, shuffled_labels
from offline_extract.engine import LoadedModel, captured_heads, last_logits
from offline_extract.heads import random_scores
from offline_extract.measure import accepted_tokens
from offline_extract.prompts import Context, Prompt, build_prompt
from offline_extract.relevance import head_relevance
from offline_extract.tasks import Pair

Progress = Callable[[str, int, int], None]
_BATCH = 20
_AIE_SAMPLES_PER_CONTEXT = 5


@dataclass(frozen=True)
class Samples:
    """Successful prompts by context, and the mean head output [n_layers, n_heads, head_dim] over them."""

    by_context: tuple[tuple[Context, tuple[Prompt, ...]], ...]
    mean: Float32

    @property
    def count(self) -> int:
        """Number of successful prompts."""
        return sum(len(prompts) for _, prompts in self.by_context)


def collect_samples(
    loaded: LoadedModel,
    contexts: Sequence[Context],
    queries: Sequence[Pair],
    *,
    samples: int,
    fmt: PromptFormat,
    progress: Progress,
) -> Samples:
    """Run each context's queries until it has its share of rank-1 successes, averaging head outputs at S."""
    share = -(-samples // len(contexts))
    info = loaded.info
    total = torch.zeros(info.n_layers, info.n_heads, info.head_dim, dtype=torch.float64)
    collected = []
    done = 0
    for context in contexts:
        kept: list[Prompt] = []
        for start in range(0, len(queries), _BATCH):
            prompts = [build_prompt(loaded.tokenizer, context, q, fmt) for q in queries[start : start + _BATCH]]
            with captured_heads(loaded) as heads:
                tops = last_logits(loaded, [p.ids for p in prompts]).argmax(-1).tolist()
            rows = [i for i, p in enumerate(prompts) if tops[i] in accepted_tokens(loaded, p.pair, fmt)]
            rows = rows[: share - len(kept)]
            stacked = torch.stack([heads[layer] for layer in range(info.n_layers)], dim=1)
            total += stacked[rows].double().cpu().sum(0)
            kept += [prompts[i] for i in rows]
            progress("samples", done + len(kept), samples)
            if len(kept) == share:
                break
        done += len(kept)
        collected.append((context, tuple(kept)))
    if done == 0:
        raise WeakPackError(f"{info.id} gave no right answer on any training word")
    return Samples(tuple(c for c in collected if c[1]), (total / done).float().numpy())


def score_heads(
    loaded: LoadedModel, samples: Samples, selection: HeadSelection, *, fmt: PromptFormat, seed: int, progress: Progress
) -> Float32:
    """Head scores [n_layers, n_heads] by AttnLRP relevance, AIE, or at random."""
    if selection == "random":
        return random_scores((loaded.info.n_layers, loaded.info.n_heads), seed)
    if selection == "aie":
        return _aie(loaded, samples, fmt, seed, progress)
    parts = []
    for _, prompts in samples.by_context:
        for start in range(0, len(prompts), _BATCH):
            parts.append(head_relevance(loaded, prompts[start : start + _BATCH]))
            progress("relevance", sum(map(len, parts)), samples.count)
    return torch.cat(parts).double().mean(0).float().numpy()


def _aie(loaded: LoadedModel, samples: Samples, fmt: PromptFormat, seed: int, progress: Progress) -> Float32:
    effects = []
    for number, (context, prompts) in enumerate(samples.by_context):
        if len(context.shots) < 2:
            raise BadInputError(
                "--head-selection aie needs solved examples to shuffle: use --source icl or instruction+icl "
                "(uninformative instructions are not in this version)"
            )
        uninformative = shuffled_labels(context, seed + number)
        for prompt in prompts[:_AIE_SAMPLES_PER_CONTEXT]:
            shuffled = build_prompt(loaded.tokenizer, uninformative, prompt.pair, fmt)
            effects.append(indirect_effect(loaded, shuffled, samples.mean))
            progress("indirect effect", len(effects), len(samples.by_context) * _AIE_SAMPLES_PER_CONTEXT)
    return torch.stack(effects).double().mean(0).float().numpy()
