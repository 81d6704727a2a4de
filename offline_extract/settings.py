"""K, scale, FV layer and steered positions, each chosen on validation words only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fv_steer.pack import Float32, Int32
from fv_steer.schema import Apply, PromptFormat
from fv_steer.steer import Offsets
from offline_extract.collect import Progress
from offline_extract.engine import LoadedModel
from offline_extract.heads import function_vector, top_heads
from offline_extract.measure import answer_hits, steered_quality
from offline_extract.prompts import Prompt

TOP_KS = (5, 10, 20, 40)
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
_APPLIES: tuple[Apply, ...] = ("last", "generation")


@dataclass(frozen=True)
class Choice:
    """The settings a pack recommends, and `steered_quality` on the validation words they were chosen by."""

    heads: Int32
    scale: float
    layer: int
    apply: Apply
    fv: Float32
    quality: float


def dfv(mean: Float32, heads: Int32, scale: float) -> Offsets:
    """DFV offsets of a set of heads."""
    by_layer: dict[int, Float32] = {}
    for layer, head in heads.tolist():
        by_layer.setdefault(layer, np.zeros_like(mean[layer]))[head] = np.float32(scale) * mean[layer, head]
    return Offsets({layer: value.reshape(-1) for layer, value in by_layer.items()}, {})


def fv_at(vector: Float32, layer: int, scale: float) -> Offsets:
    """FV offsets after one layer."""
    return Offsets({}, {layer: np.float32(scale) * vector})


def choose_settings(
    loaded: LoadedModel,
    scores: Float32,
    mean: Float32,
    validation: Sequence[Prompt],
    *,
    top_k: int | None,
    scale: float | None,
    fmt: PromptFormat,
    progress: Progress,
) -> Choice:
    """Validation words decide: `steered_quality` K, scale (ties: the smaller) and layer; whole answers `apply`."""
    n_heads = scores.size
    ks = [top_k] if top_k else [k for k in TOP_KS if k <= n_heads]
    scales = [scale] if scale is not None else list(SCALES)
    trials = []
    for k in ks:
        for factor in scales:
            quality = steered_quality(loaded, validation, dfv(mean, top_heads(scores, k), factor), fmt)
            trials.append((-quality, factor, k))
            progress("K and scale", len(trials), len(ks) * len(scales))
    loss, factor, k = min(trials)
    heads = top_heads(scores, k)
    vector = function_vector(loaded, heads, mean)
    by_layer = []
    for layer in range(loaded.info.n_layers):
        by_layer.append(steered_quality(loaded, validation, fv_at(vector, layer, factor), fmt))
        progress("FV layer", layer + 1, loaded.info.n_layers)
    offsets = dfv(mean, heads, factor)
    answers = {apply: sum(answer_hits(loaded, validation, offsets, apply)) for apply in _APPLIES}
    apply = max(_APPLIES, key=lambda a: answers[a])
    return Choice(heads, factor, int(np.argmax(by_layer)), apply, vector, -loss)
