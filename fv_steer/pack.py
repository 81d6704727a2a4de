"""The steering pack: one safetensors file of heads, mean activations and provenance.

Contract: DESIGN.md section 2. Reading executes nothing and needs no torch.
"""

import hashlib
import json
import os
import stat
import struct
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import ValidationError

from fv_steer.errors import PackFormatError, PackMismatchError
from fv_steer.schema import Manifest, ModelInfo

FORMAT = "fv-steer-pack"
FORMAT_VERSION = "1"
MAX_HEADER_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2 * 2**30

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Pack:
    """A validated steering pack.

    heads: int32 [K, 2], (layer, head), best first.
    mean: float32 [n_layers, n_heads, head_dim], mean head output at the query position.
    scores: float32 [n_layers, n_heads], the ranking's scores.
    fv: float32 [hidden_size], sum over heads of W_O[l,h] mean[l,h].
    """

    manifest: Manifest
    heads: Int32
    mean: Float32
    scores: Float32
    fv: Float32

    def __post_init__(self) -> None:
        _check_tensors(self)
        for array in self.tensors.values():
            array.setflags(write=False)

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """Tensors by their name in the file."""
        return {"fv": self.fv, "heads": self.heads, "mean": self.mean, "scores": self.scores}

    @property
    def name(self) -> str:
        """The pack's own name (a server may load it under another)."""
        return self.manifest.name

    @cached_property
    def digest(self) -> str:
        """Sha256 hex over the canonical manifest and the tensors.

        The creation time is left out: the same inputs and seed give the same digest.
        """
        content = self.manifest.model_dump(mode="json", exclude={"created"})
        sha = hashlib.sha256(canonical_json(content))
        for name, array in sorted(self.tensors.items()):
            sha.update(f"\0{name}:{array.dtype.name}:{list(array.shape)}\0".encode())
            sha.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return sha.hexdigest()

    def dfv_offsets(self) -> dict[int, Float32]:
        """DFV offsets by layer, each [n_heads, head_dim], zero for heads not selected."""
        offsets: dict[int, Float32] = {}
        for layer, head in self.heads.tolist():
            offsets.setdefault(layer, np.zeros_like(self.mean[layer]))[head] = self.mean[layer, head]
        return offsets


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces, as hashed by every digest here."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_pack(pack: Pack, path: str | os.PathLike[str]) -> None:
    """Write `pack` to `path` atomically: a reader sees the old file, or the whole new one."""
    target = Path(path)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "manifest": canonical_json(pack.manifest.model_dump(mode="json")).decode(),
    }
    data = _ordered_save(pack.tensors, metadata)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _ordered_save(tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """Serialise with the metadata keys in sorted order.

    The library writes them in hash order, which differs from process to process;
    a pack's bytes must not.
    """
    raw = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata=metadata)
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def read_pack(path: str | os.PathLike[str]) -> Pack:
    """Read and validate a pack; raises PackFormatError saying which rule the file breaks."""
    source = Path(path)
    try:
        _check_file(source)
        with safetensors.safe_open(source, framework="numpy") as file:
            manifest = _manifest(source, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in _check_header(source, file, manifest.model)}
    except OSError as error:
        raise PackFormatError(f"cannot read pack {source}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise PackFormatError(f"{source} is not a valid safetensors file: {error}") from None
    try:
        return Pack(manifest=manifest, **tensors)
    except PackFormatError as error:
        raise PackFormatError(f"{source}: {error}") from None


def _check_file(source: Path) -> None:
    """Refuse what is no safetensors file, reading no more than a bounded header."""
    status = source.stat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise PackFormatError(f"{source} is no regular file")
    if size > MAX_FILE_BYTES:
        raise PackFormatError(f"{source} is {size} bytes; a pack is at most {MAX_FILE_BYTES}")
    with source.open("rb") as file:
        prefix = file.read(9)
        if len(prefix) < 8:
            raise PackFormatError(f"{source} is truncated: {size} bytes is no safetensors file")
        if prefix[8:] not in (b"", b"{"):
            raise PackFormatError(f"{source} {_what_it_is(prefix)}; a pack is a safetensors file")
        (length,) = struct.unpack("<Q", prefix[:8])
        if length > MAX_HEADER_BYTES:
            raise PackFormatError(f"{source} declares a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        if 8 + length > size:
            raise PackFormatError(f"{source} is truncated: its header needs {length} bytes, the file has {size - 8}")
        file.seek(8)
        header = file.read(length)
    _check_layout(source, header, size - 8 - length)


def _what_it_is(prefix: bytes) -> str:
    if prefix.startswith(b"PK"):
        return "is a zip archive (a torch checkpoint?)"
    if prefix.startswith(b"\x80"):
        return "is a pickle, which is never loaded"
    return "is no safetensors file"


def _check_layout(source: Path, header: bytes, data_bytes: int) -> None:
    """Check that the tensors cover the data exactly; the library checks the rest of the header."""
    try:
        entries = json.loads(header.decode())
    except UnicodeDecodeError:
        raise PackFormatError(f"{source}: its header is not UTF-8") from None
    except (ValueError, RecursionError):
        raise PackFormatError(f"{source}: its header is not JSON, or nested too deeply") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise PackFormatError(f"{source}: its header holds an entry that describes no tensor")
    spans: list[Any] = [entry.get("data_offsets") for name, entry in entries.items() if name != "__metadata__"]
    if not all(isinstance(s, list) and len(s) == 2 and all(type(n) is int for n in s) for s in spans):
        raise PackFormatError(f"{source}: its data offsets are not pairs of integers")
    end = 0
    for start, stop in sorted(spans):
        if start != end or stop < start:
            raise PackFormatError(f"{source}: its data offsets overlap, leave a gap or run backwards at {start}")
        end = stop
    if end != data_bytes:
        raise PackFormatError(
            f"{source} is truncated or padded: its tensors need {end} bytes of data, the file has {data_bytes}"
        )


def _manifest(source: Path, metadata: dict[str, str]) -> Manifest:
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        raise PackFormatError(f"{source} is no steering pack: format is {found[:80]!r}, expected {FORMAT!r}")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise PackFormatError(
            f"{source} has pack format version {version and version[:80]!r}; "
            f"this fv-steer reads version {FORMAT_VERSION!r}: upgrade fv-steer"
        )
    unknown = sorted(set(metadata) - {"format", "format_version", "manifest"})
    if unknown:
        raise PackFormatError(f"{source} has unknown metadata keys: {', '.join(repr(key[:80]) for key in unknown[:5])}")
    if "manifest" not in metadata:
        raise PackFormatError(f"{source} has no manifest in its metadata")
    try:
        manifest = Manifest.model_validate_json(metadata["manifest"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise PackFormatError(f"{source}: its manifest is not JSON: {first['ctx']['error']}") from None
        where = ".".join(str(part) for part in first["loc"])[:200]
        field = f"manifest field {where!r}" if where else "manifest"
        raise PackFormatError(f"{source}: {field}: {first['msg']}") from None
    return manifest


def _expected(model: ModelInfo) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Dtype (safetensors name) and shape of each tensor; None stands for K."""
    grid = (model.n_layers, model.n_heads)
    return {
        "heads": ("I32", (None, 2)),
        "mean": ("F32", (*grid, model.head_dim)),
        "scores": ("F32", grid),
        "fv": ("F32", (model.hidden_size,)),
    }


def _check_header(source: Path, file: Any, model: ModelInfo) -> list[str]:
    """Check names, dtypes and shapes before any tensor is read; returns the names."""
    expected = _expected(model)
    names = set(file.keys())
    if missing := sorted(set(expected) - names):
        raise PackFormatError(f"{source}: tensor {missing[0]!r} is missing")
    if unknown := sorted(names - set(expected)):
        raise PackFormatError(f"{source}: unknown tensor {unknown[0][:80]!r}")
    for name, (dtype, shape) in expected.items():
        view = file.get_slice(name)
        found = tuple(view.get_shape())
        if view.get_dtype() != dtype:
            raise PackFormatError(f"{source}: tensor {name!r} has dtype {view.get_dtype()}, expected {dtype}")
        if len(found) != len(shape) or any(e is not None and e != f for e, f in zip(shape, found, strict=True)):
            wanted = [e if e is not None else "K" for e in shape]
            raise PackFormatError(f"{source}: tensor {name!r} has shape {list(found)}, expected {wanted}")
    return list(expected)


def _check_tensors(pack: Pack) -> None:
    model = pack.manifest.model
    for name, (dtype, shape) in _expected(model).items():
        array = pack.tensors[name]
        numpy_dtype = {"I32": "int32", "F32": "float32"}[dtype]
        fits = array.ndim == len(shape) and all(e is None or e == f for e, f in zip(shape, array.shape, strict=True))
        if array.dtype != numpy_dtype or not fits:
            raise PackFormatError(f"tensor {name!r} is {array.dtype}{list(array.shape)}, expected {numpy_dtype}{shape}")
        if dtype == "F32" and not np.isfinite(array).all():
            raise PackFormatError(f"tensor {name!r} contains NaN or Inf")
    heads = pack.heads
    limit = np.array([model.n_layers, model.n_heads])
    if len(heads) == 0:
        raise PackFormatError("tensor 'heads' is empty")
    if bad := [tuple(row) for row in heads.tolist() if min(row) < 0 or (np.array(row) >= limit).any()]:
        raise PackFormatError(
            f"tensor 'heads' names {bad[0]}, out of range for {model.n_layers} layers x {model.n_heads} heads"
        )
    if len({tuple(row) for row in heads.tolist()}) != len(heads):
        raise PackFormatError("tensor 'heads' names a head twice")
    if pack.manifest.recipe.top_k != len(heads):
        raise PackFormatError(f"manifest says top_k={pack.manifest.recipe.top_k}, tensor 'heads' has {len(heads)} rows")
    if pack.manifest.recommended.layer >= model.n_layers:
        raise PackFormatError(
            f"manifest recommends layer {pack.manifest.recommended.layer}; the model has {model.n_layers} layers"
        )


def check_fits(pack: Pack, model: ModelInfo, *, ignore_fingerprint: bool = False) -> None:
    """Raise PackMismatchError, saying what differs, unless `pack` was made for `model`."""
    made_for = pack.manifest.model
    a, b = made_for, model
    if (a.n_layers, a.n_heads) != (b.n_layers, b.n_heads):
        raise PackMismatchError(
            f"pack {pack.name!r} was made for {a.n_layers} layers x {a.n_heads} heads; "
            f"the model has {b.n_layers} x {b.n_heads}"
        )
    for field in ("model_type", "n_kv_heads", "head_dim", "hidden_size"):
        if getattr(a, field) != getattr(b, field):
            raise PackMismatchError(
                f"pack {pack.name!r} was made for {field} {getattr(a, field)}; the model has {getattr(b, field)}"
            )
    if not ignore_fingerprint and a.weights_fingerprint != b.weights_fingerprint:
        raise PackMismatchError(
            f"pack {pack.name!r} was made for {a.id} (weights {a.weights_fingerprint[:12]}); "
            f"the weights of {b.id} are {b.weights_fingerprint[:12]}; ignore the fingerprint to load it all the same"
        )
