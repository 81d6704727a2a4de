"""fv-steer: function vectors as portable steering packs.

The core: pack format, request specs, model references and errors. Importing
it loads neither torch nor transformers nor vLLM, and its names load on first
use, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fv_steer._version import __version__
from fv_steer.errors import FvSteerError

if TYPE_CHECKING:
    from fv_steer.pack import Pack, read_pack, write_pack
    from fv_steer.schema import Manifest, Recommended, SteeringSpec
    from fv_steer.serving import request_args, vllm_config

__all__ = [
    "FvSteerError",
    "Manifest",
    "Pack",
    "Recommended",
    "SteeringSpec",
    "__version__",
    "read_pack",
    "request_args",
    "vllm_config",
    "write_pack",
]

_HOMES = {
    "Manifest": "schema",
    "Pack": "pack",
    "Recommended": "schema",
    "SteeringSpec": "schema",
    "read_pack": "pack",
    "request_args": "serving",
    "vllm_config": "serving",
    "write_pack": "pack",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fv_steer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fv_steer.{_HOMES[name]}"), name)
