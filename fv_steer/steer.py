"""Steering a Hugging Face model: the formula and the hooks that apply it.

DFV adds `scale * mean[l, h]` at o_proj's input of each selected head; FV adds
`scale * fv` to the residual stream after one layer (paper, section 3.2).
torch is imported only when a model is steered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fv_steer.families import family_of
from fv_steer.pack import Float32, Pack
from fv_steer.schema import Apply, Mode

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Offsets:
    """Scaled offsets by layer: `heads[l]` [n_heads * head_dim] at o_proj's input, `residual[l]` [hidden_size]."""

    heads: dict[int, Float32]
    residual: dict[int, Float32]


def pack_offsets(
    pack: Pack, *, mode: Mode | None = None, scale: float | None = None, layer: int | None = None
) -> Offsets:
    """The offsets a pack adds; what is None takes the pack's recommendation."""
    recommended = pack.manifest.recommended
    factor = np.float32(recommended.scale if scale is None else scale)
    if (mode or recommended.mode) == "fv":
        return Offsets({}, {recommended.layer if layer is None else layer: factor * pack.fv})
    return Offsets({index: factor * o.reshape(-1) for index, o in pack.dfv_offsets().items()}, {})


def decoder_layers(model: Any) -> Any:
    """The model's decoder layers, by its family's row; raises ModelError for an unknown family."""
    return model.get_submodule(family_of(model.config.model_type).layers)


def o_projs(model: Any) -> list[Any]:
    """Every layer's attention output projection."""
    path = family_of(model.config.model_type).o_proj
    return [layer.get_submodule(path) for layer in decoder_layers(model)]


@contextmanager
def steered(model: Any, offsets: Offsets, apply: Apply = "generation") -> Iterator[None]:
    """Steer every forward pass of a HF causal LM inside the block.

    A pass without cached keys is a prompt, whose last column is the query
    position (so batches are padded on the left); a pass with cached keys
    generates. The hooks are removed on the way out, also on an exception.
    """
    tracker = _PositionTracker(apply)
    handles = [model.register_forward_pre_hook(tracker, with_kwargs=True)]
    try:
        layers = decoder_layers(model)
        projections = o_projs(model)
        for index, offset in offsets.heads.items():
            handles.append(projections[index].register_forward_pre_hook(_add_before(tracker, offset)))
        for index, offset in offsets.residual.items():
            handles.append(layers[index].register_forward_hook(_add_after(tracker, offset)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _PositionTracker:
    """Says which columns of the current pass are steered."""

    def __init__(self, apply: Apply) -> None:
        self.apply = apply
        self.columns = slice(0, 0)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        generating = cache is not None and cache.get_seq_length() > 0
        if self.apply == "all" or (generating and self.apply == "generation"):
            self.columns = slice(None)
        elif generating:
            self.columns = slice(0, 0)
        else:
            self.columns = slice(-1, None)


def _offset_for(offset: Float32, hidden: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.array(offset)).to(hidden.device, hidden.dtype)


def _added(tracker: _PositionTracker, offset: Float32, hidden: "torch.Tensor") -> "torch.Tensor":
    hidden = hidden.clone()
    hidden[:, tracker.columns] += _offset_for(offset, hidden)
    return hidden


def _add_before(tracker: _PositionTracker, offset: Float32) -> Any:
    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_added(tracker, offset, args[0]), *args[1:])

    return hook


def _add_after(tracker: _PositionTracker, offset: Float32) -> Any:
    def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (_added(tracker, offset, output[0]), *output[1:])
        return _added(tracker, offset, output)

    return hook
