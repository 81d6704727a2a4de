"""The main job, end to end, on the embedded model: extract two packs, serve them, call the API.

Run by `make demo`. Everything goes through the public command line and the
real `openai` client; the exit code is 0 only if at least five of the six
steered answers are right.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai

MODEL = "smollm2-135m"
OUT = Path("demo-out")
BIN = Path(sys.executable).parent
#: Inputs that are in no built-in task, and what a person would answer.
CALLS = {
    "present-past": {"polish": "polished", "sprinkle": "sprinkled", "wander": "wandered"},
    "singular-plural": {"kitten": "kittens", "blanket": "blankets", "lantern": "lanterns"},
}
START_LIMIT_S = 300


def extract(task: str) -> Path:
    pack = OUT / f"{task}.safetensors"
    print(f"\n$ fv-steer extract --model {MODEL} --task {task} -o {pack}", flush=True)
    subprocess.run([BIN / "fv-steer", "extract", "--model", MODEL, "--task", task, "-o", pack], check=True)
    return pack


def unused_inputs_check() -> None:
    """The six inputs must not be among the words the packs were made from or measured on."""
    from offline_extract.tasks import load_task

    for task, calls in CALLS.items():
        known = {pair.input for pair in load_task(task).pairs}
        if used := known & set(calls):
            sys.exit(f"demo inputs {used} are among {task}'s words")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(packs: dict[str, Path]) -> Iterator[str]:
    """A real `vllm serve` with the packs; stopped on the way out."""
    port = free_port()
    model = json.loads(subprocess.check_output([BIN / "fv-steer", "models", "--json"]))[0]["path"]
    flags = [f"--steering-pack={name}={path}" for name, path in packs.items()]
    command = [
        "vllm",
        "serve",
        model,
        "--served-model-name",
        MODEL,
        "--port",
        str(port),
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--max-num-seqs",
        "16",
        *flags,
    ]
    print("\n$ " + " ".join(command), flush=True)
    log = (OUT / "server.log").open("w")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen([BIN / command[0], *command[1:]], stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait(process, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()
        print("server stopped", flush=True)


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}:\n" + (OUT / "server.log").read_text()[-3000:])
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url):
            return
        time.sleep(1)
    sys.exit("the server did not start in time:\n" + (OUT / "server.log").read_text()[-3000:])


def answer(client: openai.OpenAI, word: str, steering: dict[str, object] | None) -> str:
    completion = client.completions.create(
        model=MODEL,
        prompt=f"\nQ: {word}\nA:",
        max_tokens=8,
        temperature=0,
        stop=["\n"],
        extra_body={"steering": steering},
    )
    return completion.choices[0].text.strip()


def main() -> None:
    OUT.mkdir(exist_ok=True)
    unused_inputs_check()
    packs = {task: extract(task) for task in CALLS}
    right = 0
    with server(packs) as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        print(f"\n{'steering':17}{'input':12}{'unsteered':32}{'steered':20}")
        for task, calls in CALLS.items():
            for word, expected in calls.items():
                steered = answer(client, word, {"pack": task})
                plain = answer(client, word, None)
                right += steered == expected
                mark = "right" if steered == expected else f"wrong, expected {expected}"
                print(f"{task:17}{word:12}{plain[:30]:32}{steered:14}{mark}", flush=True)
    print(f"\n{right} of 6 steered answers right")
    sys.exit(0 if right >= 5 else 1)


if __name__ == "__main__":
    main()
