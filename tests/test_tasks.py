import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fv_steer.errors import TaskError
from offline_extract.tasks import Pair, load_dataset, load_task, split, task_names, with_overrides

SIZES = {
    "antonym": 160,
    "capitalize": 200,
    "choose_last_of_3": 200,
    "country-capital": 180,
    "english-french": 170,
    "english-spanish": 170,
    "present-past": 200,
    "singular-plural": 200,
}


def rows(n: int = 40) -> list[dict[str, object]]:
    return [{"input": f"in{i}", "output": f"out{i}"} for i in range(n)]


def write(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8", newline="")
    elif path.suffix == ".jsonl":
        assert isinstance(content, list)
        path.write_text("\n".join(json.dumps(row) for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_built_in_tasks_are_the_expected_ones() -> None:
    assert task_names() == sorted(SIZES)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_built_in_task_is_valid(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert task.description.endswith(".")
    assert task.source
    assert task.licence == "CC0-1.0"
    assert len(task.pairs) >= SIZES[name]
    assert len({p.input for p in task.pairs}) == len(task.pairs)
    for pair in task.pairs:
        assert pair.outputs
        assert pair.input not in pair.outputs
        assert len(set(pair.outputs)) == len(pair.outputs)
        assert all(text and text == text.strip() for text in (pair.input, *pair.outputs))
    assert len(task.instructions) >= 6
    assert len({i.text for i in task.instructions}) == len(task.instructions)
    for instruction in task.instructions:
        assert instruction.text.count(instruction.frame) == 1
        assert 0 < len(instruction.frame) < len(instruction.text)


def test_rule_based_tasks_follow_their_rule() -> None:
    assert all(p.outputs == (p.input.capitalize(),) and p.input.islower() for p in load_task("capitalize").pairs)
    for pair in load_task("choose_last_of_3").pairs:
        items = pair.input.split(", ")
        assert len(set(items)) == 3
        assert pair.outputs == (items[2],)


def test_antonyms_have_no_word_as_input_and_as_target() -> None:
    pairs = load_task("antonym").pairs
    assert not {p.input for p in pairs} & {p.target for p in pairs}


@pytest.mark.parametrize("name", ["present-past", "singular-plural"])
def test_lower_case_tasks(name: str) -> None:
    assert all(p.input.islower() and p.target.islower() for p in load_task(name).pairs)


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"unknown task 'antonim' \(did you mean 'antonym'\?\).*singular-plural"):
        load_task("antonim")
    with pytest.raises(TaskError, match=r"unknown task '\.\./x'; built-in"):
        load_task("../x")


def test_digest_covers_the_pairs() -> None:
    task = load_task("antonym")
    content = [[p.input, list(p.outputs)] for p in task.pairs]
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    assert task.digest == hashlib.sha256(text.encode()).hexdigest()


CSV_ROWS = "".join(f"in{i},out{i}\n" for i in range(40))

BAD = {
    "missing.json": (None, ["cannot read the dataset", "No such file"]),
    "type.txt": ("x", ["unknown dataset type '.txt'", ".json, .jsonl, .csv"]),
    "syntax.json": ("[{", ["not valid JSON", "line 1"]),
    "empty.json": ("", ["not valid JSON"]),
    "deep.json": ("[" * 200_000, ["not valid JSON"]),
    "object.json": ({"a": 1}, ["must hold a list of objects, holds an object"]),
    "item.json": ([*rows(), "x"], ["row 41 must be an object", "is a string"]),
    "null.json": ([*rows(), None], ["row 41 must be an object", "is null"]),
    "no_output.json": ([{"input": "a"}], ["row 1 has no 'output'"]),
    "extra.json": ([{"input": "a", "output": "b", "c": 1}], ["row 1 has the unknown key 'c'"]),
    "number.json": ([*rows(1), {"input": 3, "output": "b"}], ["row 2: 'input' must be a string, is a number"]),
    "bool.json": ([{"input": "a", "output": True}], ["'output' must be a string or a list of strings, is a boolean"]),
    "nested.json": ([{"input": "a", "output": ["b", ["c"]]}], ["row 1: 'output' must be", "is a list"]),
    "no_outputs.json": ([{"input": "a", "output": []}], ["row 1: 'output' is an empty list"]),
    "blank.json": ([{"input": " ", "output": "b"}], ["row 1: 'input' is empty"]),
    "blank_output.json": ([{"input": "a", "output": ["b", ""]}], ["row 1: 'output' is empty"]),
    "surrogate.json": ('[{"input": "\\ud800", "output": "b"}]', ["row 1: 'input' contains half of a surrogate"]),
    "clash.json": (
        [*rows(), {"input": "in2", "output": "other"}],
        ["row 41 gives 'in2' the output 'other', row 3 gives 'out2'"],
    ),
    "few.json": (rows(29), ["29 usable pairs; at least 30"]),
    "few_unique.json": (rows(29) * 2, ["29 usable pairs"]),
    "latin1.json": ('[\n"é"]'.encode("latin-1"), ["line 2 is not UTF-8 text (byte 0xe9)"]),
    "syntax.jsonl": ('{"input": "a", "output": "b"}\n\n{"input"', ["row 3 is not valid JSON"]),
    "list.jsonl": ("[1]", ["row 1 must be an object", "is a list"]),
    "empty.jsonl": ("", ["0 usable pairs"]),
    "empty.csv": ("", ["header must name the columns input and output, not -"]),
    "header.csv": ("a,b\n" + CSV_ROWS, ["header must name the columns input and output, not a, b"]),
    "twice.csv": ("input,output,output\n", ["header must name"]),
    "wide.csv": ("input,output\n" + CSV_ROWS + "a,b,c\n", ["row 41 (line 42) has 3 columns, expected 2"]),
    "short.csv": ("input,output\na\n", ["row 1 (line 2) has 1 columns"]),
    "quote.csv": ('input,output\n"a"x,b\n', ["row 1 (line 2) is not valid CSV"]),
    "blank.csv": ("input,output\na,\n", ["row 1 (line 2): 'output' is empty"]),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_dataset(tmp_path: Path, name: str) -> None:
    content, fragments = BAD[name]
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(TaskError) as caught:
        load_dataset(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for fragment in fragments:
        assert fragment in message


def test_a_folder_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "d.json").mkdir()
    with pytest.raises(TaskError, match="cannot read the dataset: Is a directory"):
        load_dataset(tmp_path / "d.json")


def test_all_formats_read_alike(tmp_path: Path) -> None:
    expected = tuple(Pair(f"in{i}", (f"out{i}",)) for i in range(40))
    csv_text = "\ufeffoutput,input\r\n" + "".join(f"out{i}, in{i}\r\n" for i in range(40))
    assert load_dataset(write(tmp_path / "a.json", rows())) == expected
    assert load_dataset(write(tmp_path / "a.JSONL", "\ufeff" + "\r\n".join(map(json.dumps, rows())))) == expected
    assert load_dataset(write(tmp_path / "a.csv", csv_text)) == expected


def test_accepted_outputs_spaces_and_duplicates(tmp_path: Path) -> None:
    data = [*rows(), {"input": " a\u2028b ", "output": ["x", " y", "x"]}, rows()[0]]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in data)
    pairs = load_dataset(write(tmp_path / "a.jsonl", text))
    assert len(pairs) == 41
    assert pairs[-1] == Pair("a\u2028b", ("x", "y"))
    assert pairs[-1].target == "x"


def test_csv_value_may_hold_commas_and_newlines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'input,output\n"a, b","c\nd"\n\n' + CSV_ROWS)
    assert load_dataset(path)[0] == Pair("a, b", ("c\nd",))


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", rows())
    plain = load_task("antonym")
    assert with_overrides("antonym", None, []) == plain

    own = with_overrides("antonym", path, [("Say the opposite", "opposite")])
    assert (own.source, own.licence, len(own.pairs)) == ("mine.json", "user-supplied", 40)
    assert [(i.text, i.frame) for i in own.instructions] == [("Say the opposite", "opposite")]
    assert own.digest != plain.digest
    assert with_overrides("antonym", path, []).instructions == plain.instructions

    new = with_overrides("my-task", path, [])
    assert (new.name, new.instructions, new.pairs) == ("my-task", (), own.pairs)
    assert new.description == "The task of mine.json."


@pytest.mark.parametrize(
    ("name", "instructions", "message"),
    [
        ("my-task", [], "unknown task 'my-task'.*any other needs a dataset"),
        ("antonym", [("Say the opposite", "contrary")], "frame 'contrary' is not part of its instruction"),
        ("antonym", [("Say the opposite", "")], "empty frame"),
        ("antonym", [(" ", " ")], "instruction is empty"),
    ],
)
def test_bad_overrides(name: str, instructions: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        with_overrides(name, None, instructions)


def test_a_new_task_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="needs a name"):
        with_overrides(" ", write(tmp_path / "a.json", rows()), [])


@pytest.mark.parametrize("n", [30, 31, 37, 200])
def test_split_is_disjoint_complete_and_deterministic(n: int) -> None:
    pairs = tuple(Pair(f"in{i}", (f"out{i}",)) for i in range(n))
    parts = split(pairs, 7)
    inputs = [p.input for part in (parts.train, parts.validation, parts.test) for p in part]
    assert sorted(inputs) == sorted(p.input for p in pairs)
    assert (len(parts.train), len(parts.validation)) == (int(n * 0.35), int(n * 0.25))
    assert len(parts.test) >= 0.4 * n
    assert split(pairs, 7) == parts
    assert split(pairs, 8) != parts


def test_split_is_the_same_in_another_process() -> None:
    code = (
        "from offline_extract.tasks import load_task, split; print(split(load_task('antonym').pairs, 3).test[0].input)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == split(load_task("antonym").pairs, 3).test[0].input
