import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "vllm"}


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", *args],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def loaded(importtime: str) -> set[str]:
    """Top-level packages in the output of `python -X importtime`."""
    lines = [line for line in importtime.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in lines}


def test_importing_the_core_is_light() -> None:
    """`import fv_steer` loads no torch, transformers or vLLM, and neither half of the project."""
    done = run("-c", "import fv_steer")
    assert done.returncode == 0, done.stderr
    packages = loaded(done.stderr)
    assert "fv_steer" in packages
    assert not packages & (HEAVY | {"offline_extract", "fv_steer_vllm", "fv_steer_hf"})


@pytest.mark.parametrize("args", [["--help"], ["inspect", "--help"], ["extract", "--help"]], ids=" ".join)
def test_help_is_light(args: list[str]) -> None:
    """`fv-steer --help`, of the program and of its commands, loads no torch, transformers or vLLM."""
    done = run("-m", "fv_steer.cli", *args)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage" in done.stdout
    assert not loaded(done.stderr) & HEAVY
