"""The real `vllm serve` over HTTP, with the real `openai` client."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from fv_steer.pack import read_pack
from fv_steer.steer import pack_offsets, steered

pytestmark = pytest.mark.serving
BIN = Path(sys.executable).parent
NAME = "smollm2"


def start(model_dir, *flags):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [BIN / "vllm", "serve", model_dir, "--served-model-name", NAME, "--port", str(port), "--dtype", "float32",
               "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8", *flags]  # fmt: skip
    return port, command, environment


@pytest.fixture(scope="module")
def server(model_dir, pack_files, tmp_path_factory):
    flags = [f"--steering-pack={name}={pack_files[name]}" for name in ("one", "two")]
    port, command, environment = start(model_dir, *flags)
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(400):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def complete(client, steering, **options):
    body = {} if steering is ... else {"steering": steering}
    return client.completions.with_raw_response.create(
        model=NAME, prompt="\nQ: walk\nA:", max_tokens=8, temperature=0, extra_body=body, **options
    )


@pytest.fixture(scope="module")
def hf(model_dir, pack_files):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)

    def answer(pack, prompt="\nQ: walk\nA:", **how):
        apply = how.pop("apply", "generation")
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad(), steered(model, pack_offsets(read_pack(pack_files[pack]), **how), apply):
            out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    answer.tokenizer = tokenizer
    return answer


def test_completion_is_steered_and_says_so(client, hf, pack_files):
    """The object form steers as HF does, and the header names pack, digest, scale and mode."""
    raw = complete(client, {"pack": "one", "scale": 0.5})
    assert raw.parse().choices[0].text == hf("one", scale=0.5)
    digest = read_pack(pack_files["one"]).digest[:12]
    assert raw.headers["x-fv-steer"] == f"one@{digest};scale=0.5;mode=dfv"


def test_string_form_takes_the_packs_recommendation(client, hf):
    """A name alone uses the recommended mode, scale and apply."""
    assert complete(client, "two").parse().choices[0].text == hf("two")


@pytest.mark.parametrize("steering", [..., None, False])
def test_unsteered_requests_are_untouched(client, steering):
    """Absent, null and false are no steering, without a header."""
    raw = complete(client, steering)
    assert "x-fv-steer" not in raw.headers
    assert raw.parse().choices[0].text == complete(client, ...).parse().choices[0].text
    assert raw.parse().choices[0].text != complete(client, "one").parse().choices[0].text


def test_flat_fields(client, hf):
    """`vllm_xargs` steers the same way."""
    flat = {"steering_pack": "one", "steering_scale": 0.5, "steering_apply": "last"}
    raw = client.completions.with_raw_response.create(
        model=NAME, prompt="\nQ: walk\nA:", max_tokens=8, temperature=0, extra_body={"vllm_xargs": flat}
    )
    assert raw.parse().choices[0].text == hf("one", scale=0.5, apply="last")
    assert raw.headers["x-fv-steer"].startswith("one@")


def test_streaming_completion(client):
    """A stream carries the header and the same text."""
    with client.completions.with_streaming_response.create(
        model=NAME, prompt="\nQ: walk\nA:", max_tokens=8, temperature=0, stream=True,
        extra_body={"steering": {"pack": "one", "mode": "fv"}},
    ) as response:  # fmt: skip
        assert response.headers["x-fv-steer"].endswith("mode=fv")
        text = "".join(chunk.choices[0].text for chunk in response.parse())
    assert text == complete(client, {"pack": "one", "mode": "fv"}).parse().choices[0].text


def test_chat(client, hf):
    """Chat completions are steered at the templated prompt's last token, streaming too."""
    messages = [{"role": "user", "content": "walk"}]
    arguments = {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0,
                 "extra_body": {"steering": {"pack": "two", "scale": 0.5}}}  # fmt: skip
    prompt = hf.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    chunks = client.chat.completions.create(stream=True, **arguments)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole == streamed == hf("two", prompt, scale=0.5)


BAD = [
    ({"steering": "nope"}, "unknown steering pack 'nope'; loaded: one, two"),
    ({"steering": True}, "got bool"),
    ({"steering": 3}, "got int"),
    ({"steering": []}, "empty list"),
    ({"steering": [3]}, "got int"),
    ({"steering": {}}, "'steering.pack' is required"),
    ({"steering": {"pack": 3}}, "steering.pack"),
    ({"steering": {"pack": "one", "sale": 1}}, "'steering.sale' is not a known field"),
    ({"steering": {"pack": "one", "scale": True}}, "steering.scale"),
    ({"steering": {"pack": "one", "scale": "1"}}, "steering.scale"),
    ({"steering": {"pack": "one", "scale": 1e9}}, "between -100 and 100"),
    ({"steering": {"pack": "one", "mode": "vector"}}, "steering.mode"),
    ({"steering": {"pack": "one", "apply": "first"}}, "steering.apply"),
    ({"steering": {"pack": "one", "layer": 2}}, "is for mode 'fv'"),
    ({"steering": {"pack": "one", "mode": "fv", "layer": 30}}, "layers 0 to 29"),
    ({"steering": {"pack": "one", "mode": "fv", "layer": -1}}, "steering.layer"),
    ({"steering": {"pack": "one", "mode": "fv", "layer": 1.5}}, "steering.layer"),
    ({"steering": [{"pack": "one", "apply": "last"}, {"pack": "two", "apply": "all"}]}, "share one 'apply'"),
    ({"vllm_xargs": {"steering_pack": "nope"}}, "unknown steering pack 'nope'"),
    ({"vllm_xargs": {"steering_scale": 1.0}}, "'steering.pack' is required"),
    ({"vllm_xargs": {"steering_pack": "one", "steering_scale": True}}, "steering.scale"),
    ({"vllm_xargs": {"steering_pack": "one", "steering_typo": 1}}, "unknown field 'steering_typo'"),
    ({"vllm_xargs": {"fv_steer": "one"}}, "is internal"),
    ({"vllm_xargs": {"steering_pack": "one"}, "steering": "two"}, "given twice"),
    ({"steering": "one", "use_beam_search": True, "n": 2}, "beam search"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "message"), BAD)
def test_bad_requests_get_400_before_the_first_byte(server, body, message, stream):
    """Each has its own message, in the API's error shape; a stream is refused, not started."""
    content = {"model": NAME, "prompt": "x", "max_tokens": 2, "stream": stream, **body}
    response = httpx.post(f"{server}/v1/completions", json=content)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == 400


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff", b'{"model": "smollm2", "prompt": "x", "steering": NaN}'])
def test_malformed_bodies_are_refused_not_dropped(server, raw):
    """What is no JSON object is vLLM's to refuse; the server lives on."""
    headers = {"content-type": "application/json"}
    assert 400 <= httpx.post(f"{server}/v1/completions", content=raw, headers=headers).status_code < 500
    assert httpx.get(f"{server}/health").status_code == 200


def test_server_refuses_to_start_with_a_bad_pack(model_dir, tmp_path):
    """A file that is no pack ends the start with exit code 1 and one clear message."""
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a pack")
    _, command, environment = start(model_dir, f"--steering-pack={bad}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "fv-steer: " in done.stderr
    assert str(bad) in done.stderr
    assert "Traceback" not in done.stderr
