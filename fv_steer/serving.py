"""Plain values for the offline vLLM classes; importable without vLLM."""

from typing import Any

from fv_steer.schema import parse_steering

#: The key under which the plugin's settings travel in vLLM's `additional_config`.
CONFIG_KEY = "fv_steer"
#: The key under which a request's parsed specs travel in `SamplingParams.extra_args`.
REQUEST_KEY = "fv_steer"


def vllm_config(
    packs: dict[str, str], *, default: str | None = None, max_packs: int | None = None, ignore_fingerprint: bool = False
) -> dict[str, Any]:
    """`additional_config` for `vllm.LLM`: `LLM(model, additional_config=vllm_config(packs={...}))`.

    packs: name -> path of a pack file.
    """
    return {
        CONFIG_KEY: {
            "packs": {name: str(path) for name, path in packs.items()},
            "default": default,
            "max_packs": max_packs,
            "ignore_fingerprint": ignore_fingerprint,
        }
    }


def request_args(steering: Any) -> dict[str, Any]:
    """`SamplingParams(extra_args=request_args({"pack": "plural", "scale": 1.0}))`.

    Takes what the API's `steering` field takes. Raises SteeringRequestError if it is malformed.
    """
    specs = parse_steering(steering)
    return {REQUEST_KEY: [spec.model_dump(exclude_none=True) for spec in specs]} if specs else {REQUEST_KEY: False}
