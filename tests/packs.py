"""A small valid pack, always the same, for every test that needs one."""

import copy
from typing import Any

import numpy as np

from fv_steer.pack import Pack
from fv_steer.schema import Manifest


def _arm(value: float) -> dict[str, Any]:
    score = {"value": value, "low": value / 2, "high": (1 + value) / 2}
    return {"top1": score, "exact": dict(score)}


MANIFEST: dict[str, Any] = {
    "name": "tiny-antonym",
    "task": "antonym",
    "description": "Gegenteil — 反义词",
    "model": {
        "id": "acme/tiny",
        "revision": "0123abc",
        "model_type": "llama",
        "n_layers": 2,
        "n_heads": 3,
        "n_kv_heads": 1,
        "head_dim": 4,
        "hidden_size": 12,
        "weights_fingerprint": "a" * 64,
        "tokenizer_fingerprint": "b" * 64,
    },
    "recipe": {
        "source": "instruction",
        "source_reason": "asked for",
        "format": "qa",
        "instructions": [{"text": "Write the antonym.", "frame": "antonym"}],
        "shots": 0,
        "samples": 16,
        "head_selection": "lrp",
        "heads_from": "task",
        "top_k": 2,
        "dtype": "float32",
        "seed": 7,
        "dataset": {"name": "antonym", "digest": "c" * 64, "licence": "CC0-1.0"},
    },
    "recommended": {"mode": "dfv", "scale": 1.5, "apply": "generation", "layer": 1},
    "evaluation": {
        "n": 64,
        "unsteered": _arm(0.0625),
        "source_prompt": _arm(0.875),
        "dfv": _arm(0.75),
        "fv": _arm(0.5),
        "random_heads": _arm(0.125),
    },
    "versions": {"fv-steer": "0.1.0", "torch": "2.13.0"},
    "created": "2025-01-02T03:04:05Z",
}


def manifest_dict(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """MANIFEST with `changes`, whose keys are dotted paths ("model.n_layers")."""
    manifest = copy.deepcopy(MANIFEST)
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place = manifest
        for key in parents:
            place = place[key]
        place[last] = value
    return manifest


def make_tensors(
    n_layers: int = 2, n_heads: int = 3, head_dim: int = 4, hidden_size: int = 12, k: int = 2
) -> dict[str, np.ndarray]:
    """Valid tensors of a geometry: exact binary fractions, no random numbers."""
    cells = n_layers * n_heads
    flat = [(cell * 7 + 5) % cells for cell in range(cells)] if cells % 7 else list(range(cells))
    return {
        "heads": np.array([divmod(cell, n_heads) for cell in flat[:k]], np.int32).reshape(k, 2),
        "mean": (np.arange(cells * head_dim, dtype=np.float32) / 8 - 1).reshape(n_layers, n_heads, head_dim),
        "scores": (np.arange(cells, dtype=np.float32) / 16).reshape(n_layers, n_heads),
        "fv": np.arange(hidden_size, dtype=np.float32) / 4 - 1,
    }


def make_pack(
    *,
    n_layers: int = 2,
    n_heads: int = 3,
    head_dim: int = 4,
    hidden_size: int = 12,
    k: int = 2,
    changes: dict[str, Any] | None = None,
    **tensors: np.ndarray,
) -> Pack:
    """A valid Pack; `changes` to the manifest by dotted path, `tensors` replace the made ones."""
    geometry = {"n_layers": n_layers, "n_heads": n_heads, "head_dim": head_dim, "hidden_size": hidden_size}
    fitted = {f"model.{name}": value for name, value in geometry.items()} | {"recipe.top_k": k}
    fitted["recommended.layer"] = min(1, n_layers - 1)
    manifest = Manifest.model_validate(manifest_dict(fitted | (changes or {})))
    return Pack(manifest=manifest, **(make_tensors(**geometry, k=k) | tensors))
