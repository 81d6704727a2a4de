"""Steering inside a worker: tables of offsets, one row and scale per token, and the hooks that add them.

A row holds a full set of offsets: per layer at o_proj's input (DFV) and at the
layer's output (FV). Row 0 is zero. Each pack has a row per mode, whatever the
scales; a request that adds several packs, or puts the FV after another layer,
gets a row of its own while it is in the batch, of which there are max_num_seqs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fv_steer.pack import Pack
from fv_steer_vllm.request import steered_range
from fv_steer_vllm.settings import Registry, Resolved

_OFFSET_HEADS = "fv_steer_head_offsets"
_OFFSET_RESIDUAL = "fv_steer_residual_offsets"
_ROW = "fv_steer_row"
_SCALE = "fv_steer_scale"


@dataclass(frozen=True)
class HookedLayer:
    """A decoder layer on this worker; `heads` is the slice of the flattened heads its o_proj sees (tensor parallel)."""

    index: int
    layer: Any
    o_proj: Any
    heads: slice


@dataclass(frozen=True)
class Seat:
    """How one request of the batch is steered: row, scale and steered positions [start, end)."""

    row: int
    scale: float
    start: int
    end: int


_UNSTEERED = Seat(0, 0.0, 0, 0)


class Steering:
    """The tables and buffers of one worker."""

    def __init__(
        self,
        registry: Registry,
        layers: Sequence[HookedLayer],
        *,
        hidden_size: int,
        max_tokens: int,
        max_seqs: int,
        device: Any,
    ) -> None:
        self.registry = registry
        self.layers = layers
        self._packs: dict[str, Pack] = {p.digest: p for p in registry.packs.values()}
        self._static = {key: 1 + i for i, key in enumerate((d, mode) for d in self._packs for mode in ("dfv", "fv"))}
        first_free = 1 + len(self._static)
        self._free = list(range(first_free + max_seqs, first_free - 1, -1))
        self.n_rows = first_free + max_seqs + 1
        self._composed: dict[str, tuple[tuple[Resolved, ...], int]] = {}
        self._dirty = False
        self.row = torch.zeros(max_tokens, dtype=torch.long, device=device)
        self.scale = torch.zeros(max_tokens, dtype=torch.float32, device=device)
        for hooked in layers:
            self._hook(hooked, hidden_size, device)
        for (digest, mode), row in self._static.items():
            pack = self._packs[digest]
            self._write(row, [_unit(digest, mode, pack.manifest.recommended.layer)])

    def _hook(self, hooked: HookedLayer, hidden_size: int, device: Any) -> None:
        width = hooked.heads.stop - hooked.heads.start
        for module, name, columns, hook in (
            (hooked.o_proj, _OFFSET_HEADS, width, "pre"),
            (hooked.layer, _OFFSET_RESIDUAL, hidden_size, "post"),
        ):
            # Buffers of the module, so that compiled code takes them as inputs and never folds them.
            table = torch.zeros(self.n_rows, columns, dtype=torch.float32, device=device)
            module.register_buffer(name, table, persistent=False)
            module.register_buffer(_ROW, self.row, persistent=False)
            module.register_buffer(_SCALE, self.scale, persistent=False)
            if hook == "pre":
                module.register_forward_pre_hook(_add_to_input)
            else:
                module.register_forward_hook(_add_to_output)

    def _write(self, row: int, specs: Sequence[Resolved]) -> None:
        """Fill one row of every table with the sum of `specs`, each times its scale."""
        for hooked in self.layers:
            heads, residual = getattr(hooked.o_proj, _OFFSET_HEADS), getattr(hooked.layer, _OFFSET_RESIDUAL)
            head_sum, residual_sum = np.zeros(heads.shape[1], np.float32), np.zeros(residual.shape[1], np.float32)
            for spec in specs:
                pack = self._packs[spec.digest]
                if spec.mode == "fv":
                    if spec.layer == hooked.index:
                        residual_sum += np.float32(spec.scale) * pack.fv
                    continue
                for layer, head in pack.heads.tolist():
                    if layer == hooked.index:
                        dim = pack.mean.shape[2]
                        begin = head * dim - hooked.heads.start
                        if 0 <= begin < len(head_sum):
                            head_sum[begin : begin + dim] += np.float32(spec.scale) * pack.mean[layer, head]
            heads[row].copy_(torch.from_numpy(head_sum))
            residual[row].copy_(torch.from_numpy(residual_sum))

    def seats(self, batch: Sequence[tuple[str, tuple[Resolved, ...], int]]) -> list[Seat]:
        """A seat for each (request id, specs, prompt length) of the batch, in order.

        Composed rows of requests that left the batch are freed first; a
        preempted request composes its row again when it comes back.
        """
        present = {request_id for request_id, specs, _ in batch if specs}
        for gone in self._composed.keys() - present:
            self._free.append(self._composed.pop(gone)[1])
        return [self._seat(*item) if item[1] else _UNSTEERED for item in batch]

    def _seat(self, request_id: str, specs: tuple[Resolved, ...], prompt_len: int) -> Seat:
        start, end = steered_range(specs[0].apply, prompt_len)
        first = specs[0]
        recommended = self._packs[first.digest].manifest.recommended.layer
        if len(specs) == 1 and (first.mode == "dfv" or first.layer == recommended):
            return Seat(self._static[first.digest, first.mode], first.scale, start, end)
        known = self._composed.get(request_id)
        if known is None or known[0] != specs:
            row = known[1] if known else self._free.pop()
            self._write(row, specs)
            self._composed[request_id] = (specs, row)
            return Seat(row, 1.0, start, end)
        return Seat(known[1], 1.0, start, end)

    def fill(self, seats: Sequence[Seat], request_index: torch.Tensor, positions: torch.Tensor) -> None:
        """Set row and scale of each token of the next forward pass; the rest of the buffers is zero.

        request_index: [tokens] index into `seats`; positions: [tokens] absolute
        positions. Both on the device.
        """
        if not any(seat.row for seat in seats):
            self.clear()
            return
        count = len(positions)
        device = self.row.device
        table = torch.tensor([(s.row, s.start, s.end) for s in seats], dtype=torch.long).to(device, non_blocking=True)
        scales = torch.tensor([s.scale for s in seats], dtype=torch.float32).to(device, non_blocking=True)
        request_index = request_index.long()
        rows, start, end = table[request_index].unbind(1)
        active = (positions >= start) & (positions < end)
        self.row.zero_()
        self.scale.zero_()
        self.row[:count] = torch.where(active, rows, 0)
        self.scale[:count] = torch.where(active, scales[request_index], 0.0)
        self._dirty = True

    def clear(self) -> None:
        """Steer nothing in the next forward pass."""
        if self._dirty:
            self.row.zero_()
            self.scale.zero_()
            self._dirty = False


def _unit(digest: str, mode: Any, layer: int) -> Resolved:
    return Resolved(name="", digest=digest, mode=mode, scale=1.0, layer=layer, apply="all")


def _offsets(module: Any, name: str, like: torch.Tensor) -> torch.Tensor:
    count = like.shape[0]
    rows = getattr(module, name)[getattr(module, _ROW)[:count]]
    return (rows * getattr(module, _SCALE)[:count, None]).to(like.dtype)


def _add_to_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] + _offsets(module, _OFFSET_HEADS, args[0]), *args[1:])


def _add_to_output(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0] + _offsets(module, _OFFSET_RESIDUAL, output[0]), *output[1:])
    return output + _offsets(module, _OFFSET_RESIDUAL, output)
