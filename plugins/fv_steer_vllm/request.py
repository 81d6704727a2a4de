"""Steering in `SamplingParams.extra_args`: from what a client sent to what the engine acts on.

The front end resolves once; the scheduler (prefix cache) and the workers then
need no more than the resolved value, kept under RESOLVED_KEY.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fv_steer.errors import SteeringRequestError
from fv_steer.serving import REQUEST_KEY
from fv_steer_vllm.settings import Registry, Resolved

RESOLVED_KEY = "fv_steer_resolved"

#: Flat fields for clients that can send only `vllm_xargs`.
FLAT_FIELDS = {
    "steering_pack": "pack",
    "steering_scale": "scale",
    "steering_mode": "mode",
    "steering_layer": "layer",
    "steering_apply": "apply",
}


def flat_steering(xargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `steering` object the flat fields spell, or None. Raises SteeringRequestError."""
    unknown = sorted(k for k in xargs if k.startswith("steering") and k not in FLAT_FIELDS)
    if unknown:
        raise SteeringRequestError(
            f"unknown field {unknown[0]!r} in vllm_xargs; known: {', '.join(FLAT_FIELDS)}", unknown[0]
        )
    found = {FLAT_FIELDS[key]: value for key, value in xargs.items() if key in FLAT_FIELDS}
    return found or None


def requested(extra_args: Mapping[str, Any] | None, registry: Registry) -> list[Resolved]:
    """Resolve what a request's extra_args ask for; without any, the server's default."""
    args = extra_args or {}
    flat = flat_steering(args)
    if REQUEST_KEY in args:
        if flat:
            raise SteeringRequestError("steering was given twice: as 'steering' and in flat fields")
        value = args[REQUEST_KEY]
        if isinstance(value, str):
            with contextlib.suppress(ValueError):  # else a bare pack name
                value = json.loads(value)
        return registry.resolve(None if value == [] else value)
    return registry.resolve(flat) if flat else registry.default()


def with_resolved(extra_args: Mapping[str, Any] | None, specs: list[Resolved]) -> dict[str, Any] | None:
    """`extra_args` with the client's steering fields replaced by the resolved value."""
    kept = {
        k: v for k, v in (extra_args or {}).items() if k not in FLAT_FIELDS and k not in (REQUEST_KEY, RESOLVED_KEY)
    }
    # A scale of zero adds nothing, so it must share everything with the unsteered request.
    acting = [dataclasses.asdict(spec) for spec in specs if spec.scale != 0]
    if acting:
        kept[RESOLVED_KEY] = acting
    return kept or None


def resolved_of(sampling_params: Any) -> tuple[Resolved, ...]:
    """The resolved specs a request carries inside the engine; empty if it is not steered."""
    extra = getattr(sampling_params, "extra_args", None)
    if not extra or RESOLVED_KEY not in extra:
        return ()
    return tuple(Resolved(**item) for item in extra[RESOLVED_KEY])


def steered_range(apply: str, prompt_len: int) -> tuple[int, int]:
    """Absolute positions [start, end) that are steered; the query position is prompt_len - 1."""
    start = 0 if apply == "all" else prompt_len - 1
    return start, prompt_len if apply == "last" else 2**31 - 1
