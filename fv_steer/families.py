"""What differs between model families, as data: one row per `model_type`."""

from dataclasses import dataclass

from fv_steer.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Module paths, relative to the HF causal-LM model, and how its weights act."""

    layers: str = "model.layers"
    o_proj: str = "self_attn.o_proj"
    norm_class: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family(norm_class="LlamaRMSNorm"),
    "qwen3": Family(norm_class="Qwen3RMSNorm"),
}


def family_of(model_type: str) -> Family:
    """The row for `model_type`; raises ModelError listing the known families."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model family {model_type!r} is not supported; supported: {known}") from None
