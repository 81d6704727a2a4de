import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hostile
from fv_steer import pack as pack_module
from fv_steer.errors import BadInputError, PackFormatError
from fv_steer.pack import Pack, read_pack
from packs import make_pack

RULES = sorted({case.words for case in hostile.CASES})
VALID = hostile.pack_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(PackFormatError) as caught:
        read_pack(path)
    assert isinstance(caught.value, BadInputError)
    assert caught.value.exit_code == 2
    assert caught.value.http_status == 400
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 1000 + len(str(path))
    return message.replace(str(path), "")


def test_the_untouched_file_is_valid(tmp_path: Path) -> None:
    """The file that every hostile case is bent from is itself a valid pack."""
    path = tmp_path / "ok.safetensors"
    path.write_bytes(VALID)
    assert read_pack(path).digest == make_pack().digest


@pytest.mark.parametrize("case", hostile.CASES, ids=lambda case: case.id)
def test_hostile_file_is_refused(tmp_path: Path, case: hostile.Case) -> None:
    """A hostile file is bad input with a message that names its own problem and no other."""
    message = refusal(hostile.write(case, tmp_path))
    assert case.words in message
    assert [words for words in RULES if words in message] == [case.words]


def test_case_ids_are_unique() -> None:
    """Every case has a name of its own."""
    assert len({case.id for case in hostile.CASES}) == len(hostile.CASES)


def test_missing_file(tmp_path: Path) -> None:
    """A path that does not exist is said not to exist."""
    assert "No such file" in refusal(tmp_path / "absent.safetensors")


def test_directory(tmp_path: Path) -> None:
    """A folder given as a pack is said to be a folder."""
    assert "Is a directory" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(20)
def test_pipe_does_not_block(tmp_path: Path) -> None:
    """A named pipe is refused at once, not waited for."""
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refusal(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    """A file that may not be read is refused, saying so."""
    path = tmp_path / "p.safetensors"
    path.write_bytes(VALID)
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def test_oversized_file_is_not_read(tmp_path: Path) -> None:
    """A file over the size limit is refused by its size alone (here a sparse one)."""
    path = tmp_path / "huge.safetensors"
    path.write_bytes(VALID)
    os.truncate(path, pack_module.MAX_FILE_BYTES + 1)
    assert "a pack is at most 2147483648" in refusal(path)


def test_long_names_are_not_echoed_whole(tmp_path: Path) -> None:
    """A message stays short and free of control characters, whatever the file says."""
    evil = "\x1b[31m" + "A" * 100_000
    for number, data in enumerate(
        [
            hostile.pack_bytes(metadata=hostile.metadata_of(format=evil)),
            hostile.pack_bytes(metadata=hostile.metadata_of(format_version=evil)),
            hostile.pack_bytes(metadata=hostile.metadata_of(**{evil: "x"})),
            hostile.pack_bytes(changes={evil: 1}),
            hostile.pack_bytes(tensors={evil: hostile.make_tensors()["fv"]}),
        ]
    ):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(data)
        assert "\x1b" not in refusal(path)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever bytes are overwritten, cut or inserted, reading gives a pack or PackFormatError."""
    raw = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        gone = data.draw(st.sampled_from([0, 1, 1, 8, 100]))
        raw[at : at + gone] = data.draw(st.binary(max_size=max(1, gone)))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bytes(raw))
    try:
        assert isinstance(read_pack(path), Pack)
    except PackFormatError as error:
        assert str(path) in str(error)
