"""Keys and values of every block, in buffers that are written in place: a column per token, rows aligned at the right.

Batches are left-padded, so that the newest token of every row is in the same column. Which columns a block has filled
is kept elsewhere (`lanes.Lane`), here only where a pass writes: a rectangle of rows and columns, or scattered tokens.
The class speaks the cache protocol of transformers 5 (`update`, `get_seq_length`, `get_mask_sizes`), which is all that
blocks and mask builders use of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from adaptive.anatomy import plain_copy
from adaptive.turned import turned


class Filled(Exception):
    """Raised inside a block, right after it has written its K/V, to leave out the rest of it."""


class KV(Cache):
    """K/V of `layers` blocks for `batch` rows, with room for `capacity` tokens before the buffers grow.

    Attributes:
        column: number of tokens before the ones being run; the next K/V are written from here.
        rows: indices [kept] of the rows being run, or None for all of them.
        cells: None, or where tokens that form no rectangle are: rows [tokens], columns [tokens], and the columns
            [tokens, column + 1] that each may see, its own last. Each is then a batch entry of its own.
        stop: leave each block after its K/V are written (raises `Filled`).
        given: per block, K/V that some of the tokens being run have from elsewhere: which of them, bool [rows, 1,
            tokens, 1], their keys and their values.
        batch: rows in use, the first ones of the buffers.
        keys, values: per block [batch or more, kv heads, capacity, head dim], or None before the first write.
    """

    def __init__(self, layers: int, capacity: int, batch: int):
        super().__init__(layers=[])
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.capacity = capacity
        self.column = 0
        self.rows: Tensor | None = None
        self.cells: tuple[Tensor, Tensor, Tensor] | None = None
        self.batch = batch
        self.stop = False
        self.given: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Writes K/V [rows, kv heads, tokens, head dim] at `column` and returns those of all tokens so far."""
        if self.cells is not None:
            self._reserve(layer_idx, key_states, value_states)
            return self._scatter(self.keys[layer_idx], key_states), self._scatter(self.values[layer_idx], value_states)
        for which, keys, values in self.given.get(layer_idx, []):
            key_states = torch.where(which, keys, key_states)
            value_states = torch.where(which, values, value_states)
        self.write(layer_idx, key_states, value_states)
        if self.stop:
            raise Filled
        rows, end = key_states.shape[0], self.column + key_states.shape[2]
        if self.rows is None:
            return self.keys[layer_idx][:rows, :, :end], self.values[layer_idx][:rows, :, :end]
        keys, values = self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]
        return keys.index_select(0, self.rows), values.index_select(0, self.rows)

    def write(self, layer: int, key_states: Tensor, value_states: Tensor) -> None:
        """Writes K/V [rows, kv heads, tokens, head dim] of a block at `column`."""
        end = self._reserve(layer, key_states, value_states)
        where = slice(key_states.shape[0]) if self.rows is None else self.rows
        self.keys[layer][where, :, self.column : end] = key_states
        self.values[layer][where, :, self.column : end] = value_states

    def _reserve(self, layer: int, key_states: Tensor, value_states: Tensor) -> int:
        end = self.column + key_states.shape[2]
        if self.keys[layer] is None or end > self.keys[layer].shape[2]:
            self._grow(layer, key_states, value_states, end)
        return end

    def _scatter(self, buffer: Tensor, states: Tensor) -> Tensor:
        """Writes states [tokens, kv heads, 1, head dim] and returns what each token sees, aligned at the right, so that
        to the block every one of them is the newest token of a left-padded row."""
        rows, columns, seen = self.cells
        buffer[rows, :, columns] = states[:, :, 0]
        return buffer[rows[:, None], :, seen].transpose(1, 2)

    def _grow(self, layer: int, key_states: Tensor, value_states: Tensor, end: int) -> None:
        self.capacity = self.capacity if end <= self.capacity else 2 * end
        for buffers, states in ((self.keys, key_states), (self.values, value_states)):
            fresh = states.new_zeros(self.batch, states.shape[1], self.capacity, states.shape[3])
            if buffers[layer] is not None:
                fresh[:, :, : buffers[layer].shape[2]] = buffers[layer][: self.batch]
            buffers[layer] = fresh

    def select(self, kept: Tensor, end: int) -> None:
        """Keeps only these rows, in ascending order, and their first `end` columns, for good."""
        self.batch, stay = len(kept), int((kept == torch.arange(len(kept), device=kept.device)).cumprod(0).sum())
        for buffer in (*self.keys, *self.values):
            if buffer is not None:  # in place: new memory costs more than what is moved
                buffer[stay : self.batch, :, :end] = buffer[kept[stay:], :, :end]

    def repeat(self, rows: Tensor, end: int) -> None:
        """Adds copies of these rows, of their first `end` columns, behind the others."""
        before, self.batch = self.batch, self.batch + len(rows)
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                if buffer is not None:
                    if self.batch > len(buffer):
                        buffers[layer] = buffer.new_empty(2 * self.batch, *buffer.shape[1:])
                        buffers[layer][:before, :, :end] = buffer[:before, :, :end]
                    buffers[layer][before : self.batch, :, :end] = buffer[rows, :, :end]

    def shift(self, row: int, by: int, end: int) -> None:
        """Moves the first `end` columns of a row to the right; what they leave behind is padding."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if keys is not None:
                if end + by > keys.shape[2]:
                    self._grow(layer, keys, values, end + by)
                for buffer in (self.keys[layer], self.values[layer]):
                    buffer[row, :, by : end + by] = buffer[row, :, :end].clone()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of tokens before the ones being run."""
        return self.column

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Returns how many K/V a query sees at most, and the first one's column."""
        return self.column + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: the buffers grow."""
        return -1

    def __len__(self) -> int:
        return len(self.keys)


class SharedKV:
    """Gives a block head the backbone's K/V at its depth in place of its own.

    Head block j of b, behind depth k, reads what backbone block k - b + j has cached.

    Args:
        cache: the backbone's K/V.
        offset: how much deeper the head block's source sits than the backbone block whose K/V it reads.
    """

    def __init__(self, cache: KV, offset: int):
        self.cache, self.offset = cache, offset

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Ignores what the head block projects and returns the backbone's K/V of all tokens so far."""
        rows, end = key_states.shape[0], self.cache.column + key_states.shape[2]
        keys = self.cache.keys[layer_idx - self.offset][:, :, :end]
        values = self.cache.values[layer_idx - self.offset][:, :, :end]
        if self.cache.rows is None:
            return keys[:rows], values[:rows]
        return keys.index_select(0, self.cache.rows), values.index_select(0, self.cache.rows)


class TrainingKV(KV):
    """K/V of one teacher-forced pass, kept with their gradients instead of written in place."""

    def __init__(self, layers: int):
        super().__init__(layers, 0, 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Keeps and returns K/V [batch, kv heads, tokens, head dim]."""
        self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
        return key_states, value_states


def replace_cache(value: Any, old: KV, new: Any) -> Any:
    """Returns a recorded block call (tuples, dicts, tensors) with the cache `old` in it replaced by `new`."""
    if isinstance(value, (tuple, list)):
        return type(value)(replace_cache(item, old, new) for item in value)
    if isinstance(value, dict):
        return {key: replace_cache(item, old, new) for key, item in value.items()}
    return new if value is old else value


def map_rows(value: Any, batch: int, pick) -> Any:
    """Returns `value` with `pick` applied to every tensor in it whose first dimension is the batch."""
    if isinstance(value, Tensor):
        return pick(value) if value.dim() and value.shape[0] == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(map_rows(item, batch, pick) for item in value)
    if isinstance(value, dict):
        return {key: map_rows(item, batch, pick) for key, item in value.items()}
    return value


def select_rows(calls: list, batch: int, rows: Tensor) -> list:
    """Returns the recorded block calls of `batch` rows reduced to `rows` [kept]; equal tensors are picked once."""
    seen: dict[int, Tensor] = {}

    def pick(tensor: Tensor) -> Tensor:
        """Returns the rows of a tensor."""
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor.index_select(0, rows)
        return seen[id(tensor)]

    out, before = [], None
    for call in calls:
        # Most blocks are called with the very same objects: picking once per step instead of once per block.
        same = before is not None and _leaves(call) == _leaves(before)
        out.append(out[-1] if same else map_rows(call, batch, pick))
        before = call
    return out


def _leaves(call: tuple) -> tuple:
    """Returns which objects a block is called with."""
    args, kwargs = call
    return tuple(map(id, args)), tuple(kwargs), tuple(map(id, kwargs.values()))


class PackedFill:
    """Projects a state to the K/V of many blocks in one product: W_K and W_V stacked, the norms' weights folded in.

    For blocks with K = rotary(k_norm(W_K norm(x))) and V = W_V norm(x), where the norms divide by the root mean square.
    Whether a block is one of these is not known from its names but tried (`Backbone._probe`).

    Args:
        blocks: all blocks; `AttributeError`, `TypeError` or `ValueError` if they have no such parts.
    """

    def __init__(self, blocks: nn.ModuleList):
        parts = [plain_copy(nn.ModuleList(_parts(block))) for block in blocks]  # adapters merged
        if any(type(layer) is not nn.Linear for _, *layers in parts for layer in layers):
            raise TypeError("projections of a type of their own")
        self.key = self.stamp(blocks)
        self.head_dim, self.eps = blocks[0].self_attn.head_dim, _epsilon(parts[0][0])
        weights, biases = [], []
        for norm, *layers in parts:
            gain = _gain(norm, layers[0].in_features, layers[0].weight)
            weights += [(layer.weight.float() * gain).to(layer.weight.dtype) for layer in layers]
            biases += [layer.bias for layer in layers if layer.bias is not None]
        self.weight = torch.stack(weights).unflatten(0, (len(blocks), 2))
        self.bias = torch.stack(biases).unflatten(0, (len(blocks), 2)) if biases else None
        norms = [getattr(block.self_attn, "k_norm", None) for block in blocks]
        self.k_gain = None
        if norms[0] is not None:
            self.k_gain = torch.stack([_gain(norm, self.head_dim, self.weight) for norm in norms])

    @staticmethod
    def stamp(blocks: nn.ModuleList) -> tuple:
        """Returns what changes when a weight that is packed does, or the adapters that are merged into it."""
        parts = [part for block in blocks for part in _parts(block)]
        weights = (weight for part in parts for weight in part.parameters())
        named = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # by PEFT
        adapted = (part for part in parts if hasattr(part, named[0]))
        adapters = (str([getattr(part, name, None) for name in named]) for part in adapted)
        return (*((weight.data_ptr(), weight._version) for weight in weights), *adapters)

    def unit(self, state: Tensor) -> Tensor:
        """Returns states [..., hidden] divided by their root mean square: what the weights multiply."""
        return _normed(state, self.eps).to(self.weight.dtype)

    def of(self, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Returns weights [blocks, 2, kv size, hidden] and biases [blocks, 2, kv size] of blocks first..last-1."""
        return self.weight[first:last], None if self.bias is None else self.bias[first:last]

    @turned
    def project(self, state: Tensor, calls: list, first: int, last: int, fitted=None) -> tuple[Tensor, Tensor]:
        """Returns K and V [blocks, rows, kv heads, tokens, head dim] of blocks first..last-1 for a state [rows, tokens,
        hidden], at the positions that their `calls` were recorded for.

        Args:
            fitted: a `fills.Fill`, whose weights take the place of the blocks' own; None for these.
        """
        weight, bias = (fitted or self).of(first, last)
        bias = None if bias is None else bias.flatten()
        out = nn.functional.linear(self.unit(state), weight.flatten(0, 2), bias)
        out = out.unflatten(-1, (last - first, 2, -1, self.head_dim)).permute(2, 3, 0, 4, 1, 5)
        keys, values = out[:, 0], out[:, 1]
        if self.k_gain is not None:
            keys = (_normed(keys, self.eps) * self.k_gain[first:last, None, None, None]).to(values.dtype)
        angles = [call[1]["position_embeddings"] for call in calls[first:last]]
        if all(pair[0] is angles[0][0] for pair in angles):
            cos, sin = (part[None, :, None] for part in angles[0])
        else:
            cos, sin = (torch.stack(parts)[:, :, None] for parts in zip(*angles, strict=True))
        half = self.head_dim // 2
        turned = torch.cat([-keys[..., half:], keys[..., :half]], dim=-1)
        return keys * cos + turned * sin, values


def _parts(block: nn.Module) -> tuple[nn.Module, ...]:
    return block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj


def _normed(state: Tensor, eps: float) -> Tensor:
    state = state.float()
    return state * torch.rsqrt(state.square().mean(-1, keepdim=True) + eps)


def _epsilon(norm: nn.Module) -> float:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))


def _gain(norm: nn.Module, size: int, like: Tensor) -> Tensor:
    """Returns what a norm multiplies each of `size` entries by, float32: some keep it as a difference from 1."""
    ones = torch.ones(1, size, dtype=like.dtype, device=like.device)
    return norm(ones)[0].float() * (1 + _epsilon(norm)) ** 0.5


def packs(blocks: nn.ModuleList, hidden: Tensor, calls: list, cache: KV) -> bool:
    """Returns whether one product gives the K/V that every block has just written, tried block by block."""
    for index, block in enumerate(blocks):
        try:
            found = PackedFill(nn.ModuleList([block])).project(hidden, calls[index : index + 1], 0, 1)
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError):
            return False
        wanted = [buffer[index][:, :, : hidden.shape[1]] for buffer in (cache.keys, cache.values)]
        if not all(map(_alike, (part[0] for part in found), wanted)):
            return False
    return True


def _alike(got: Tensor, wanted: Tensor) -> bool:
    """Returns whether two tensors differ by no more than rounding in their type."""
    if got.shape != wanted.shape:
        return False
    limit = 1e-4 if wanted.dtype == torch.float32 else 2e-2
    return bool((got.float() - wanted.float()).abs().max() <= limit * wanted.float().abs().max())
