"""Facts about a local model directory, read without torch: geometry and fingerprints."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from fv_steer.errors import ModelError
from fv_steer.schema import ModelInfo

_SAMPLE_BYTES = 4096


def model_info(directory: Path, *, model_id: str | None = None, revision: str | None = None) -> ModelInfo:
    """Geometry and fingerprints of the model in `directory`.

    Raises ModelError if its config or weights cannot be read.
    """
    config = _config(directory)
    heads = _int(directory, config, "num_attention_heads")
    hidden = _int(directory, config, "hidden_size")
    return ModelInfo(
        id=model_id or directory.name,
        revision=revision,
        model_type=str(config.get("model_type", "")),
        n_layers=_int(directory, config, "num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        hidden_size=hidden,
        weights_fingerprint=fingerprint_dir(directory),
        tokenizer_fingerprint=tokenizer_fingerprint(directory),
    )


def fingerprint_dir(directory: Path) -> str:
    """Sha256 hex over every tensor's name, dtype, shape and first and last 4 KiB.

    It does not depend on how the tensors are split over files. Reading the
    samples alone keeps it under a second for a 16 GB model.
    """
    entries: dict[str, bytes] = {}
    for path in sorted(directory.glob("*.safetensors")):
        entries.update(_tensor_entries(path))
    if not entries:
        raise ModelError(f"{directory} holds no *.safetensors weights")
    sha = hashlib.sha256()
    for name in sorted(entries):
        sha.update(name.encode() + b"\0" + entries[name])
    return sha.hexdigest()


def _tensor_entries(path: Path) -> dict[str, bytes]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            result = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(f"{entry['dtype']}{entry['shape']}".encode())
                for start in (begin, max(begin, end - _SAMPLE_BYTES)):
                    file.seek(8 + length + start)
                    digest.update(file.read(min(_SAMPLE_BYTES, end - start)))
                result[name] = digest.digest()
            return result
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"cannot read weights {path}: {error}") from None


def tokenizer_fingerprint(directory: Path) -> str:
    """Sha256 hex of tokenizer.json and the chat template; empty if there is no tokenizer.json."""
    sha = hashlib.sha256()
    found = False
    for name in ("tokenizer.json", "chat_template.jinja"):
        path = directory / name
        if path.is_file():
            found = True
            sha.update(path.read_bytes())
    return sha.hexdigest() if found else ""


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is no model configuration")
    return config.get("text_config", config)


def _int(directory: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"{directory / 'config.json'} has no valid {key!r}")
    return value
