"""From scores to heads, and from heads to the function vector."""

import random

import numpy as np
import torch

from fv_steer.pack import Float32, Int32
from fv_steer.steer import o_projs
from offline_extract.engine import LoadedModel


def top_heads(scores: Float32, k: int) -> Int32:
    """The k best heads by score, [k, 2] (layer, head), best first; ties by layer, then head."""
    flat = np.argsort(-scores.reshape(-1), kind="stable")[:k]
    return np.stack(np.unravel_index(flat, scores.shape), axis=1).astype(np.int32)


def random_scores(shape: tuple[int, int], seed: int, draw: int = 0) -> Float32:
    """Scores that rank the heads at random: the control every result is held against."""
    rng = random.Random(f"{seed}/random-heads/{draw}")
    values = list(range(shape[0] * shape[1]))
    rng.shuffle(values)
    return np.array(values, dtype=np.float32).reshape(shape)


def function_vector(loaded: LoadedModel, heads: Int32, mean: Float32) -> Float32:
    """FV [hidden_size]: sum over heads of W_O[l, h] mean[l, h] (Todd et al. 2024)."""
    dim = loaded.info.head_dim
    total = torch.zeros(loaded.info.hidden_size)
    projections = o_projs(loaded.model)
    for layer, head in heads.tolist():
        weight = projections[layer].weight[:, head * dim : (head + 1) * dim].float().cpu()
        total += weight @ torch.from_numpy(np.array(mean[layer, head]))
    return total.numpy()
