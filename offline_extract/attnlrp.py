"""AttnLRP's rules as modified gradients (Achtibat et al. 2024; paper, Table 3).

The forward pass is unchanged; inside the context manager the backward pass
propagates relevance: relevance of a tensor = tensor * its gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from fv_steer.errors import ModelError
from fv_steer.families import Family
from fv_steer.steer import decoder_layers

_ATTENTION = "fv_steer_attnlrp"


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """`x` itself, its gradient multiplied by `factor` (the uniform rule of a product)."""
    return factor * x + ((1 - factor) * x).detach()


@dataclass
class Trace:
    """What the attention saw at the query position, by layer.

    weights: A_S, [B, n_heads, T]; values: V, [B, n_heads, T, head_dim];
    outputs: head outputs in the graph, [B, 1, n_heads, head_dim].
    """

    weights: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)


@contextmanager
def attnlrp(model: Any, family: Family) -> Iterator[Trace]:
    """Patch norms, MLPs and attention with the LRP rules; everything is restored on the way out.

    Raises ModelError if a module the family's row names was not found.
    """
    layers = decoder_layers(model)
    norms = [m for m in model.modules() if type(m).__name__ == family.norm_class]
    mlps = [layer.mlp for layer in layers]
    if len(norms) < 2 * len(layers) + 1 or any(not hasattr(m, "gate_proj") for m in mlps):
        raise ModelError(f"the modules of {type(model).__name__} do not match its family's LRP rules")
    trace = Trace()
    patched = norms + mlps
    previous = model.config._attn_implementation
    _register(trace)
    try:
        for norm in norms:
            norm.forward = _norm_rule(norm)
        for mlp in mlps:
            mlp.forward = _mlp_rule(mlp)
        model.set_attn_implementation(_ATTENTION)
        yield trace
    finally:
        model.set_attn_implementation(previous)
        for module in patched:
            module.__dict__.pop("forward", None)


def _norm_rule(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """RMSNorm: the identity rule, its denominator a constant."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).detach()
        return norm.weight * (wide * inverse).to(x.dtype)

    return forward


def _mlp_rule(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gated MLP: the activation by its identity rule, the product by the uniform rule."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate = mlp.gate_proj(x)
        with torch.no_grad():
            slope = torch.where(gate == 0, 0.0, mlp.act_fn(gate) / gate)
        return mlp.down_proj(scale_gradient(gate * slope * mlp.up_proj(x), 0.5))

    return forward


def _register(trace: Trace) -> None:
    """Register the attention whose two products follow the uniform rule, recording into `trace`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = scale_gradient(query, 0.25) @ scale_gradient(key, 0.25).transpose(2, 3) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[2]]
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        output = (weights @ scale_gradient(value, 0.5)).transpose(1, 2)
        layer = int(module.layer_idx)
        trace.weights[layer], trace.values[layer] = weights[:, :, -1].detach(), value.detach()
        trace.outputs[layer] = output
        return output, None

    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
