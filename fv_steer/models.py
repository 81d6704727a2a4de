"""Model names: aliases, Hub ids and local directories, all resolved to a local directory."""

import os
from dataclasses import dataclass
from pathlib import Path

from fv_steer.errors import ModelError

EMBEDDED = "smollm2-135m"

#: Short names for the models the README talks about.
ALIASES: dict[str, str] = {
    EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-4b": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3-8b": "Qwen/Qwen3-8B",
}


@dataclass(frozen=True)
class ResolvedModel:
    """A model's public id and the local directory that holds it."""

    id: str
    path: Path
    revision: str | None = None


def cache_dir() -> Path:
    """The user's cache: $FV_STEER_CACHE, else $XDG_CACHE_HOME/fv-steer, else ~/.cache/fv-steer."""
    if own := os.environ.get("FV_STEER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fv-steer"


def resolve_model(name: str, *, revision: str | None = None) -> ResolvedModel:
    """Resolve an alias, a local directory or a Hub id, downloading or converting if needed."""
    if name == EMBEDDED:
        from fv_steer.embedded import embedded_dir

        return ResolvedModel(ALIASES[EMBEDDED], embedded_dir())
    local = Path(name).expanduser()
    if local.is_dir():
        return ResolvedModel(local.resolve().name, local.resolve())
    return _from_hub(name, ALIASES.get(name, name), revision)


def _from_hub(name: str, repo: str, revision: str | None) -> ResolvedModel:
    if repo.count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(sorted(ALIASES))
        raise ModelError(f"no model {name!r}: not a local directory, a Hub id (ORG/NAME) or an alias ({known})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"cannot fetch model {repo} from the Hub: {str(error).splitlines()[0]} "
            "(a gated model needs `hf auth login`; without a network give a local directory)"
        ) from None
    return ResolvedModel(repo, path, path.name)


def list_models() -> list[dict[str, str | None]]:
    """Rows for `fv-steer models`: alias, model id, local path if it is on this machine.

    The embedded model is converted first, if its package is installed.
    """
    rows: list[dict[str, str | None]] = []
    for alias, model in ALIASES.items():
        rows.append({"alias": alias, "model": model, "path": _local_path(alias, model)})
    return rows


def _local_path(alias: str, model: str) -> str | None:
    try:
        if alias == EMBEDDED:
            return str(resolve_model(alias).path)
        from huggingface_hub import snapshot_download

        return str(snapshot_download(model, local_files_only=True))
    except (ModelError, ImportError, OSError, ValueError):
        return None
