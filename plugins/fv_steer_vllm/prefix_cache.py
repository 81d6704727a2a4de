"""What steering adds to a prefix-cache block's key.

KV before the first steered position does not depend on steering and is shared
by all; from the block that reaches it on, only the same steering may reuse it.
"""

from typing import Any

from fv_steer_vllm.request import resolved_of, steered_range


def block_key(request: Any, end: int) -> tuple[str, str] | None:
    """The extra key of the block that ends before token `end`, or None if no steered token reaches it."""
    specs = resolved_of(request.sampling_params)
    if not specs:
        return None
    first = min(steered_range(spec.apply, request.num_prompt_tokens)[0] for spec in specs)
    if end <= first:
        return None
    parts = [f"{s.digest}:{s.mode}:{s.layer}:{s.scale!r}:{s.apply}" for s in specs]
    return ("fv_steer", f"{first}|" + "|".join(sorted(parts)))
