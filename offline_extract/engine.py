"""Running prompts: a loaded model, and passes whose shared prefix is computed once."""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fv_steer.errors import ModelError
from fv_steer.families import Family, family_of
from fv_steer.modelinfo import model_info
from fv_steer.models import resolve_model
from fv_steer.schema import ModelInfo
from fv_steer.steer import Offsets, o_projs, steered


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in evaluation mode, its tokenizer, and who it is."""

    model: Any
    tokenizer: Any
    info: ModelInfo
    family: Family

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.device


def load_model(name: str, *, device: str = "auto", dtype: str = "float32") -> LoadedModel:
    """Load by alias, Hub id or directory; raises ModelError for an unknown family or bad device."""
    resolved = resolve_model(name)
    info = model_info(resolved.path, model_id=resolved.id, revision=resolved.revision)
    family = family_of(info.model_type)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(resolved.path, dtype=dtype).to(where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(resolved.path)
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"cannot load {name} on {where}: {str(error).splitlines()[0]}") from None
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, info, family)


@dataclass(frozen=True)
class Batch:
    """Prompts that share a token prefix, padded on the left of what differs.

    prefix: [P] token ids common to all, possibly empty.
    ids, mask: [B, Q] the rest; positions: [B, Q] absolute positions.
    """

    prefix: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @property
    def full_mask(self) -> torch.Tensor:
        """[B, P + Q]: 1 for a real token."""
        ones = self.mask.new_ones(len(self.mask), len(self.prefix))
        return torch.cat([ones, self.mask], dim=1)

    def column(self, row: int, position: int) -> int:
        """Key column of a prompt's token position."""
        p = len(self.prefix)
        return position if position < p else position + int((self.mask[row] == 0).sum())


def make_batch(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
    """Split off the longest common prefix, leaving each row at least one token."""
    common = _common_prefix(sequences)
    prefix_len = min(common, min(len(s) for s in sequences) - 1) if len(sequences) > 1 else 0
    rest = [list(s[prefix_len:]) for s in sequences]
    width = max(map(len, rest))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rest], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rest], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0) + prefix_len
    return Batch(torch.tensor(list(sequences[0][:prefix_len]), dtype=torch.long, device=device), ids, mask, positions)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def prefill(model: Any, batch: Batch, *, upto: int | None = None) -> Any:
    """Key/value cache of the prefix and of the first `upto` columns of the rest (None: no columns)."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    rows = len(batch.ids)
    with torch.no_grad():
        if len(batch.prefix):
            model.model(input_ids=batch.prefix[None], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(rows)
        if upto:
            model.model(
                input_ids=batch.ids[:, :upto],
                attention_mask=batch.full_mask[:, : len(batch.prefix) + upto],
                position_ids=batch.positions[:, :upto],
                past_key_values=cache,
                use_cache=True,
            )
    return cache


def last_logits(loaded: LoadedModel, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits at the query position, [B, vocab]."""
    batch = make_batch(sequences, loaded.device)
    with torch.no_grad():
        output = loaded.model(
            input_ids=batch.ids,
            attention_mask=batch.full_mask,
            position_ids=batch.positions,
            past_key_values=prefill(loaded.model, batch),
            use_cache=True,
            logits_to_keep=1,
        )
    return output.logits[:, -1].float()


def zero_shot_logits(loaded: LoadedModel, sequences: Sequence[Sequence[int]], offsets: Offsets | None) -> torch.Tensor:
    """Logits [B, vocab] at the query position, steered there. No cached keys, so every pass is a prompt."""
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=loaded.device)
    with torch.no_grad(), steered(loaded.model, offsets or Offsets({}, {}), "last"):
        output = loaded.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )
    return output.logits[:, -1].float()


def generate(loaded: LoadedModel, sequences: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations, left-padded batch; stops at the model's end token."""
    width = max(map(len, sequences))
    eos = loaded.model.generation_config.eos_token_id
    pad = eos[0] if isinstance(eos, list) else (eos or 0)
    ids = torch.tensor([[pad] * (width - len(s)) + list(s) for s in sequences], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=loaded.device)
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    return output[:, width:].tolist()


@contextmanager
def captured_heads(loaded: LoadedModel) -> Iterator[dict[int, torch.Tensor]]:
    """Collects o_proj's input at the last column by layer, each [B, n_heads, head_dim]."""
    store: dict[int, torch.Tensor] = {}
    shape = (loaded.info.n_heads, loaded.info.head_dim)

    def hook_for(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            store[layer] = args[0][:, -1].detach().reshape(-1, *shape)

        return hook

    handles = [p.register_forward_pre_hook(hook_for(layer)) for layer, p in enumerate(o_projs(loaded.model))]
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()


def expand_cache(cache: Any, rows: int) -> Any:
    """A copy of a one-row cache, repeated to `rows` rows."""
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(rows)
    return repeated
