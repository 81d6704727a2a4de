"""Real vLLM on the embedded model in fp32; two random packs with its geometry."""

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from fv_steer.modelinfo import model_info
from fv_steer.models import resolve_model
from fv_steer.pack import Pack, write_pack
from fv_steer.schema import Manifest
from packs import manifest_dict


def random_pack(info, seed, *, zero=False):
    """A pack strong enough to change every answer."""
    rng = np.random.default_rng(seed)
    k = 12
    flat = rng.choice(info.n_layers * info.n_heads, size=k, replace=False)
    heads = np.stack(np.unravel_index(flat, (info.n_layers, info.n_heads)), axis=1).astype(np.int32)
    mean = rng.normal(size=(info.n_layers, info.n_heads, info.head_dim)).astype(np.float32)
    fv = rng.normal(size=info.hidden_size).astype(np.float32) * 4
    scores = rng.random((info.n_layers, info.n_heads), dtype=np.float32)
    manifest = Manifest.model_validate(
        manifest_dict(
            {
                "name": f"random-{seed}",
                "model": info.model_dump(),
                "recipe.top_k": k,
                "recommended.layer": info.n_layers // 2,
            }
        )
    )
    return Pack(manifest=manifest, heads=heads, mean=mean * (not zero), scores=scores, fv=fv * (not zero))


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return resolve_model("smollm2-135m").path


@pytest.fixture(scope="session")
def pack_files(model_dir, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("packs")
    info = model_info(model_dir)
    made = {"one": random_pack(info, 1), "two": random_pack(info, 2), "zero": random_pack(info, 3, zero=True)}
    for name, pack in made.items():
        write_pack(pack, folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in made}
