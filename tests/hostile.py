"""Files that look like packs and are not, each breaking one rule.

Built by hand, byte by byte, so that no library refuses to write them.
"""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from packs import make_tensors, manifest_dict

DTYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "int32": "I32", "int64": "I64"}


def frame(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file of a raw header and raw data."""
    return struct.pack("<Q", len(header)) + header + data


def layout(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """Header entries and data of `tensors`, one after the other."""
    entries: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        entries[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return entries, data


def metadata_of(manifest: str | None = None, **changes: str | None) -> dict[str, str]:
    """Valid pack metadata with `changes`; None removes a key."""
    text = json.dumps(manifest_dict()) if manifest is None else manifest
    full = {"format": "fv-steer-pack", "format_version": "1", "manifest": text} | changes
    return {key: value for key, value in full.items() if value is not None}


def pack_bytes(
    *,
    changes: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    entries: dict[str, Any] | None = None,
    data: bytes | None = None,
) -> bytes:
    """A pack file: valid, but for what is given. A tensor of None is left out."""
    kept = {k: v for k, v in (make_tensors() | (tensors or {})).items() if v is not None}
    made, raw = layout(kept)
    made |= entries or {}
    if metadata is None:
        metadata = metadata_of(json.dumps(manifest_dict(changes)))
    header = json.dumps({"__metadata__": metadata, **made}, ensure_ascii=False).encode()
    return frame(header, raw if data is None else data)


def _pickle() -> bytes:
    return pickle.dumps({"mean": [0.0] * 64, "heads": [[0, 1]]}, protocol=4)


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle())
    return buffer.getvalue()


def _with(name: str, value: float) -> bytes:
    array = make_tensors()[name]
    array.flat[1] = value
    return pack_bytes(tensors={name: array})


def _heads(*rows: tuple[int, int]) -> bytes:
    heads = np.array(rows, np.int32).reshape(-1, 2)
    return pack_bytes(tensors={"heads": heads}, changes={"recipe.top_k": max(1, len(rows))})


def _moved(name: str, start: int, end: int) -> bytes:
    entry = layout(make_tensors())[0][name] | {"data_offsets": [start, end]}
    return pack_bytes(entries={name: entry})


def _no_manifest() -> bytes:
    metadata = metadata_of()
    del metadata["manifest"]
    return pack_bytes(metadata=metadata)


class Case(NamedTuple):
    """A hostile file and the words its error must hold; the same words mean the same rule."""

    id: str
    make: Callable[[], bytes]
    words: str


def _table() -> list[Case]:
    good = make_tensors()
    shapes = {
        "heads": np.zeros((2, 3), np.int32),
        "mean": np.zeros((2, 3, 5), np.float32),
        "scores": np.zeros((3, 2), np.float32),
        "fv": np.zeros(13, np.float32),
    }
    dtypes = {"heads": "int64", "mean": "float16", "scores": "float64", "fv": "float16"}
    nested = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    cases = [
        Case("empty", lambda: b"", "is truncated: 0 bytes"),
        Case("four-bytes", lambda: b"\x10\0\0\0", "is truncated: 4 bytes"),
        Case("truncated-header", lambda: pack_bytes()[:200], "is truncated: its header needs"),
        Case("truncated-data", lambda: pack_bytes()[:-16], "is truncated or padded: its tensors"),
        Case("padded-data", lambda: pack_bytes() + bytes(16), "is truncated or padded: its tensors"),
        Case("pickle", _pickle, "is a pickle"),
        Case("zip", _zip, "is a zip archive"),
        Case("text", lambda: b"This is my pack, please load it.\n" * 9, "is no safetensors file; a pack"),
        Case("bomb-2-60", lambda: struct.pack("<Q", 2**60) + b"{" + bytes(64), "declares a header of"),
        Case("bomb-only", lambda: struct.pack("<Q", 2**64 - 1), "declares a header of"),
        Case("bomb-100MB", lambda: frame(b"{" + b" " * (100 * 2**20 - 2) + b"}"), "declares a header of"),
        Case("header-not-json", lambda: frame(b"{this is not json}", bytes(64)), "its header is not JSON"),
        Case("header-not-utf8", lambda: frame(b'{"\xff\xfe": 1}', bytes(64)), "its header is not UTF-8"),
        Case("header-deep", lambda: frame(nested), "its header is not JSON"),
        Case("no-metadata", lambda: frame(json.dumps(layout(good)[0]).encode(), layout(good)[1]), "format is 'none'"),
        Case("format", lambda: pack_bytes(metadata=metadata_of(format="pt")), "format is 'pt'"),
        Case("no-version", lambda: pack_bytes(metadata=metadata_of(format_version=None)), "format version None"),
        Case("future-version", lambda: pack_bytes(metadata=metadata_of(format_version="2")), "format version '2'"),
        Case("metadata-key", lambda: pack_bytes(metadata=metadata_of(extra="x")), "unknown metadata keys: 'extra'"),
        Case("metadata-type", lambda: pack_bytes(metadata={"format": 3}), "is not a valid safetensors file"),
        Case("header-list", lambda: frame(b"[1, 2, 3]", bytes(64)), "is no safetensors file; a pack"),
        Case("no-manifest", _no_manifest, "has no manifest"),
        Case("manifest-not-json", lambda: pack_bytes(metadata=metadata_of("not json")), "manifest is not JSON"),
        Case("manifest-empty", lambda: pack_bytes(metadata=metadata_of("")), "manifest is not JSON"),
        Case("manifest-deep", lambda: pack_bytes(metadata=metadata_of("[" * 200_000)), "manifest is not JSON"),
        Case("manifest-list", lambda: pack_bytes(metadata=metadata_of("[]")), "manifest: Input should be an object"),
        Case("manifest-key", lambda: pack_bytes(changes={"surprise": 1}), "manifest field 'surprise'"),
        Case("manifest-deep-key", lambda: pack_bytes(changes={"model.evil": 1}), "manifest field 'model.evil'"),
        Case("manifest-name", lambda: pack_bytes(changes={"name": "../../etc/x"}), "manifest field 'name'"),
        Case("manifest-type", lambda: pack_bytes(changes={"model.n_heads": "x"}), "manifest field 'model.n_heads'"),
        Case(
            "manifest-huge", lambda: pack_bytes(changes={"model.n_layers": 10**30}), "manifest field 'model.n_layers'"
        ),
        Case(
            "manifest-nan",
            lambda: pack_bytes(changes={"recommended.scale": float("nan")}),
            "manifest field 'recommended.scale'",
        ),
        Case(
            "manifest-surrogate",
            lambda: pack_bytes(metadata=metadata_of(json.dumps(manifest_dict({"description": "\ud800"})))),
            "manifest is not JSON",
        ),
        Case("offsets-type", lambda: pack_bytes(entries={"fv": {"dtype": "F32"}}), "data offsets"),
        Case("entry-type", lambda: pack_bytes(entries={"fv": 3}), "describes no tensor"),
        Case("extra-tensor", lambda: pack_bytes(tensors={"zzz": np.zeros(3, np.float32)}), "unknown tensor 'zzz'"),
        Case("overlap", lambda: _moved("mean", 0, 96), "data offsets"),
        Case("offsets-beyond", lambda: _moved("fv", 2**40, 2**40 + 48), "data offsets"),
        Case("offsets-backwards", lambda: _moved("fv", 48, 0), "data offsets"),
        Case("offsets-negative", lambda: _moved("fv", -48, 0), "data offsets"),
        Case("heads-empty", lambda: _heads(), "tensor 'heads' is empty"),
        Case("heads-head", lambda: _heads((0, 3)), "names (0, 3), out of range"),
        Case("heads-layer", lambda: _heads((2, 0)), "names (2, 0), out of range"),
        Case("heads-negative", lambda: _heads((0, -1)), "names (0, -1), out of range"),
        Case("heads-negative-layer", lambda: _heads((-1, 0)), "names (-1, 0), out of range"),
        Case("heads-twice", lambda: _heads((0, 1), (1, 1), (0, 1)), "names a head twice"),
        Case("top-k", lambda: pack_bytes(changes={"recipe.top_k": 5}), "manifest says top_k=5"),
        Case("layer", lambda: pack_bytes(changes={"recommended.layer": 2}), "manifest recommends layer 2"),
    ]
    for name in good:
        cases += [
            Case(f"missing-{name}", lambda n=name: pack_bytes(tensors={n: None}), f"tensor {name!r} is missing"),
            Case(f"shape-{name}", lambda n=name: pack_bytes(tensors={n: shapes[n]}), f"tensor {name!r} has shape"),
            Case(f"rank-{name}", lambda n=name: pack_bytes(tensors={n: good[n][None]}), f"tensor {name!r} has shape"),
            Case(
                f"dtype-{name}",
                lambda n=name: pack_bytes(tensors={n: good[n].astype(dtypes[n])}),
                f"tensor {name!r} has dtype",
            ),
        ]
    for name in ("mean", "scores", "fv"):
        for value in (np.nan, np.inf, -np.inf):
            words = f"tensor {name!r} contains NaN or Inf"
            cases.append(Case(f"{value}-{name}", lambda n=name, v=value: _with(n, v), words))
    return cases


CASES = _table()


def write(case: Case, folder: Path) -> Path:
    """The case's file in `folder`."""
    path = folder / f"{case.id}.safetensors"
    path.write_bytes(case.make())
    return path
