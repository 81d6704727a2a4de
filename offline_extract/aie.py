"""Average indirect effect of each head (Todd et al. 2024; paper, section 3.1), exactly and cheaply.

Replacing a head's output at S changes nothing before S, so the prompt's keys
and values are computed once and each head costs a single token, batched over heads.
"""

import random
from collections.abc import Sequence

import torch

from fv_steer.pack import Float32
from fv_steer.steer import o_projs
from offline_extract.engine import LoadedModel, expand_cache, make_batch, prefill
from offline_extract.prompts import Context, Prompt
from offline_extract.tasks import Pair

_ROWS = 32


def shuffled_labels(context: Context, seed: int) -> Context:
    """The context with its examples' answers permuted so that no example keeps its own."""
    rng = random.Random(f"{seed}/shuffled")
    shots = context.shots
    step = rng.randrange(1, len(shots))
    return Context(
        context.instruction,
        tuple(Pair(s.input, shots[(i + step) % len(shots)].outputs) for i, s in enumerate(shots)),
    )


def indirect_effect(loaded: LoadedModel, prompt: Prompt, mean: Float32) -> torch.Tensor:
    """CIE of every head on one uninformative prompt, [n_layers, n_heads]: change in the target's probability."""
    batch = make_batch([prompt.ids], loaded.device)
    cache = prefill(loaded.model, batch, upto=batch.ids.shape[1] - 1)
    info = loaded.info
    grid = [(layer, head) for layer in range(info.n_layers) for head in range(info.n_heads)]
    clean = _patched(loaded, batch.ids, cache, [], mean, prompt.target)
    parts = [
        _patched(loaded, batch.ids, cache, grid[i : i + _ROWS], mean, prompt.target) for i in range(0, len(grid), _ROWS)
    ]
    return (torch.cat(parts) - clean).reshape(info.n_layers, info.n_heads)


def _patched(
    loaded: LoadedModel, ids: torch.Tensor, cache: object, heads: Sequence[tuple[int, int]], mean: Float32, target: int
) -> torch.Tensor:
    """Probability of `target` with one head of `heads` replaced per row, [len(heads) or 1]."""
    rows = max(1, len(heads))
    dim = loaded.info.head_dim
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for row, (layer, head) in enumerate(heads):
        by_layer.setdefault(layer, []).append((row, head))

    def hook_for(layer: int) -> object:
        def hook(module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = args[0].clone()
            for row, head in by_layer[layer]:
                value = torch.tensor(mean[layer, head]).to(hidden)
                hidden[row, -1, head * dim : (head + 1) * dim] = value
            return (hidden, *args[1:])

        return hook

    projections = o_projs(loaded.model)
    handles = [projections[layer].register_forward_pre_hook(hook_for(layer)) for layer in by_layer]
    position = ids.shape[1] - 1
    try:
        with torch.no_grad():
            logits = loaded.model(
                input_ids=ids[:, -1:].expand(rows, 1),
                position_ids=torch.full((rows, 1), position, device=ids.device),
                past_key_values=expand_cache(cache, rows),
                use_cache=True,
            ).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits.float().softmax(-1)[:, target].cpu()
