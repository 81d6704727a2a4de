"""The context manager a user of HF transformers calls."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fv_steer.errors import PackMismatchError
from fv_steer.pack import Pack, read_pack
from fv_steer.schema import Apply, Mode, SteeringSpec
from fv_steer.steer import pack_offsets, steered


@contextmanager
def steer(
    model: Any,
    pack: Pack | str | os.PathLike[str],
    scale: float | None = None,
    *,
    mode: Mode | None = None,
    apply: Apply | None = None,
    layer: int | None = None,
) -> Iterator[Pack]:
    """Steer a HF causal LM with a pack (or the path of one) inside the block.

    What is None takes the pack's recommendation. Batches must be padded on the
    left. Beam search and `use_cache=False` are not supported yet. Raises
    PackMismatchError if the pack's geometry is not the model's.
    """
    loaded = pack if isinstance(pack, Pack) else read_pack(Path(pack))
    _check_geometry(loaded, model.config)
    SteeringSpec(pack=loaded.name, scale=scale, mode=mode, apply=apply, layer=layer)
    offsets = pack_offsets(loaded, mode=mode, scale=scale, layer=layer)
    with steered(model, offsets, apply or loaded.manifest.recommended.apply):
        yield loaded


def _check_geometry(pack: Pack, config: Any) -> None:
    made_for = pack.manifest.model
    found = {
        "model_type": config.model_type,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "hidden_size": config.hidden_size,
    }
    for field, value in found.items():
        if getattr(made_for, field) != value:
            raise PackMismatchError(
                f"pack {pack.name!r} was made for {field} {getattr(made_for, field)}; the model has {value}"
            )
