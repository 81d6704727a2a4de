import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fv_steer import schema
from fv_steer.errors import PackFormatError, PackMismatchError
from fv_steer.pack import Pack, check_fits, read_pack, write_pack
from fv_steer.schema import Manifest
from packs import make_pack, make_tensors, manifest_dict

TESTS = Path(__file__).parent
GOLDEN = TESTS / "data" / "golden-v1.safetensors"
GOLDEN_DIGEST = "20adf6c6396a47965de6c6f9c819f2439cea045589896bd6f0011493abb8eb8d"


def python(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_same(a: Pack, b: Pack) -> None:
    assert a.manifest == b.manifest
    assert a.digest == b.digest
    for name, array in a.tensors.items():
        assert array.dtype == b.tensors[name].dtype
        np.testing.assert_array_equal(array, b.tensors[name])


@st.composite
def packs(draw: st.DrawFn) -> Pack:
    n_layers, n_heads = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    head_dim, hidden = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    cells = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    heads = draw(st.lists(st.sampled_from(cells), min_size=1, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = 10.0 ** draw(st.integers(-38, 37))

    def array(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * size).astype(np.float32)

    return make_pack(
        n_layers=n_layers,
        n_heads=n_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        k=len(heads),
        changes={"description": draw(st.text(st.characters(exclude_categories=["Cs"])))},
        heads=np.array(heads, np.int32),
        mean=array(n_layers, n_heads, head_dim),
        scores=array(n_layers, n_heads),
        fv=array(hidden),
    )


@given(packs())
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, pack: Pack) -> None:
    """What is written is read back bit for bit, whatever the geometry, text and magnitudes."""
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    write_pack(pack, path)
    assert_same(read_pack(path), pack)


def test_memory_layout_does_not_show(tmp_path: Path) -> None:
    """A pack of non-contiguous arrays has the digest and the bytes of the contiguous one."""
    strided = make_pack(mean=np.asfortranarray(make_tensors()["mean"]), fv=np.repeat(make_tensors()["fv"], 2)[::2])
    assert strided.digest == make_pack().digest
    write_pack(strided, tmp_path / "strided")
    assert (tmp_path / "strided").read_bytes() == GOLDEN.read_bytes()


def test_golden_is_read() -> None:
    """A pack written by the first release keeps its content and digest for as long as version 1 is read."""
    assert read_pack(GOLDEN).digest == GOLDEN_DIGEST
    assert_same(read_pack(GOLDEN), make_pack())


def test_golden_is_written(tmp_path: Path) -> None:
    """Writing the same pack gives the committed bytes, so a change of format cannot pass unseen."""
    write_pack(make_pack(), tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").read_bytes() == GOLDEN.read_bytes()


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_same_bytes_in_every_process(tmp_path: Path, seed: str) -> None:
    """Bytes and digest do not depend on the process's hash seed."""
    code = (
        "import sys; from packs import make_pack; from fv_steer import write_pack\n"
        "write_pack(make_pack(), sys.argv[1]); print(make_pack().digest)"
    )
    done = python(code, tmp_path / "p", PYTHONHASHSEED=seed)
    assert done.stdout.strip() == GOLDEN_DIGEST, done.stderr
    assert (tmp_path / "p").read_bytes() == GOLDEN.read_bytes()


def test_reading_loads_no_torch() -> None:
    """Reading a pack needs neither torch nor transformers."""
    code = "import sys, fv_steer; fv_steer.read_pack(sys.argv[1]); print({'torch', 'transformers'} & set(sys.modules))"
    done = python(code, GOLDEN)
    assert done.stdout.strip() == "set()", done.stderr


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return [(path, value)]
    return [leaf for key, item in pairs for leaf in leaves(item, f"{path}/{key}".lstrip("/"))]


LITERALS = [schema.Mode, schema.Apply, schema.Source, schema.PromptFormat, schema.HeadSelection]
CHOICES = [get_args(literal) for literal in LITERALS] + [("global", "task")]
LITERAL_FIELDS = {"mode", "apply", "source", "format", "head_selection", "heads_from"}
FIELDS = [path for path, _ in leaves(manifest_dict()) if path != "created"]


def other(path: str, value: Any) -> Any:
    if isinstance(value, str) and path.rsplit("/", 1)[-1] in LITERAL_FIELDS:
        return next(choice for choices in CHOICES if value in choices for choice in choices if choice != value)
    if isinstance(value, str):
        return value + "x"
    return value + 1 if isinstance(value, int) else (value + 1) / 4


def digest_with(manifest: dict[str, Any]) -> str:
    """The digest under another manifest and the same tensors, which need not fit each other."""
    pack = object.__new__(Pack)
    vars(pack).update(make_tensors(), manifest=Manifest.model_validate(manifest))
    return pack.digest


@pytest.mark.parametrize("path", FIELDS)
def test_digest_covers_manifest_field(path: str) -> None:
    """Every field of the manifest but `created` is part of the digest."""
    manifest = manifest_dict()
    place: Any = manifest
    *parents, last = path.split("/")
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = other(path, place[last])
    assert digest_with(manifest_dict()) == GOLDEN_DIGEST
    assert digest_with(manifest) != GOLDEN_DIGEST


@pytest.mark.parametrize("change", [{"evaluation": None}, {"model.revision": None}, {"recipe.instructions": []}])
def test_digest_covers_absence(change: dict[str, Any]) -> None:
    """Leaving an optional part of the manifest out changes the digest."""
    assert make_pack(changes=change).digest != GOLDEN_DIGEST


def test_digest_ignores_created() -> None:
    """The creation time is not in the digest: the same inputs and seed give the same digest."""
    assert make_pack(changes={"created": "1999-12-31T00:00:00Z"}).digest == GOLDEN_DIGEST


@pytest.mark.parametrize("name", ["heads", "mean", "scores", "fv"])
def test_digest_covers_tensor(name: str) -> None:
    """The smallest change of any tensor changes the digest."""
    array = make_tensors()[name]
    if name == "heads":
        array = array[::-1].copy()
    else:
        array.flat[-1] = np.nextafter(array.flat[-1], np.float32(np.inf))
    assert make_pack(**{name: array}).digest != GOLDEN_DIGEST


def test_tensors_are_frozen(tmp_path: Path) -> None:
    """A pack's tensors cannot be changed under its digest, made or read."""
    for pack in (make_pack(), read_pack(GOLDEN)):
        for array in pack.tensors.values():
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_packs_compare_and_hash() -> None:
    """Packs can be compared and put in a set without numpy complaining."""
    pack = make_pack()
    assert pack == pack
    assert pack != make_pack()
    assert len({pack, pack}) == 1


def test_pack_built_in_memory_is_checked() -> None:
    """The rules for files hold for packs built in memory too."""
    good = make_pack()
    with pytest.raises(PackFormatError, match="'mean' is float64"):
        replace(good, mean=good.mean.astype(np.float64))
    with pytest.raises(PackFormatError, match="'heads' is empty"):
        replace(good, heads=np.zeros((0, 2), np.int32))
    with pytest.raises(PackFormatError, match="top_k=2"):
        replace(good, heads=np.array([[0, 1]], np.int32))


def test_dfv_offsets() -> None:
    """DFV offsets hold the mean of the selected heads and zero elsewhere."""
    pack = make_pack()
    offsets = pack.dfv_offsets()
    total = np.zeros_like(pack.mean)
    for layer, offset in offsets.items():
        total[layer] = offset
    expected = np.zeros_like(pack.mean)
    for layer, head in pack.heads.tolist():
        expected[layer, head] = pack.mean[layer, head]
    np.testing.assert_array_equal(total, expected)
    assert set(offsets) == set(pack.heads[:, 0].tolist())


def test_write_makes_folders_and_honours_umask(tmp_path: Path) -> None:
    """A pack is written into a new folder with the permissions any new file gets."""
    path = tmp_path / "new" / "folder" / "p.safetensors"
    old = os.umask(0o027)
    try:
        write_pack(make_pack(), path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(path.parent) == ["p.safetensors"]


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    """A write that fails or is interrupted leaves the old file whole and nothing else."""
    path = tmp_path / "p.safetensors"
    path.write_bytes(GOLDEN.read_bytes())

    def fail(*args: object, **kwargs: object) -> None:
        raise copy.copy(error)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(os, call, fail)
        write_pack(make_pack(changes={"name": "other"}), path)
    assert os.listdir(tmp_path) == ["p.safetensors"]
    assert path.read_bytes() == GOLDEN.read_bytes()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_write_leaves_old_file(tmp_path: Path, call: str) -> None:
    """A writer killed at any moment leaves the old file whole, and what it leaves is never taken for a pack."""
    path = tmp_path / "p.safetensors"
    path.write_bytes(GOLDEN.read_bytes())
    code = (
        "import os, signal, sys; from packs import make_pack; from fv_steer import write_pack\n"
        "setattr(os, sys.argv[2], lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))\n"
        "write_pack(make_pack(changes={'name': 'other'}), sys.argv[1])"
    )
    done = python(code, path, call)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == GOLDEN.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors"] == ["p.safetensors"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n_layers", 3, ["2 layers x 3 heads", "3 x 3"]),
        ("n_heads", 6, ["2 layers x 3 heads", "2 x 6"]),
        ("model_type", "qwen3", ["model_type llama", "qwen3"]),
        ("n_kv_heads", 3, ["n_kv_heads 1", "3"]),
        ("head_dim", 8, ["head_dim 4", "8"]),
        ("hidden_size", 16, ["hidden_size 12", "16"]),
    ],
)
@pytest.mark.parametrize("ignore_fingerprint", [False, True])
def test_another_geometry_is_refused(field: str, value: Any, words: list[str], ignore_fingerprint: bool) -> None:
    """A pack for another geometry or family is refused, naming both values, whatever is ignored."""
    pack = make_pack()
    model = pack.manifest.model.model_copy(update={field: value})
    with pytest.raises(PackMismatchError) as caught:
        check_fits(pack, model, ignore_fingerprint=ignore_fingerprint)
    for word in ["tiny-antonym", *words]:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2


def test_other_weights_are_refused_unless_ignored() -> None:
    """Other weights of the same geometry are refused, unless the fingerprint is ignored."""
    pack = make_pack()
    model = pack.manifest.model.model_copy(update={"weights_fingerprint": "d" * 64, "id": "acme/other"})
    with pytest.raises(PackMismatchError, match=r"weights aaaaaaaaaaaa.*acme/other are dddddddddddd"):
        check_fits(pack, model)
    check_fits(pack, model, ignore_fingerprint=True)


@pytest.mark.parametrize("update", [{}, {"id": "/data/tiny"}, {"revision": None}])
def test_same_model_elsewhere_fits(update: dict[str, Any]) -> None:
    """The same weights fit under any name, folder or revision."""
    pack = make_pack()
    check_fits(pack, pack.manifest.model.model_copy(update=update))
