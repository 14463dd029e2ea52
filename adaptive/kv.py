"""Keys and values of every block, in buffers that are written in place: one column per token, rows aligned.

Batches are left-padded, so all rows fill the same column in a step; `frontier` questions become one integer. The class
speaks the cache protocol of transformers 5 (`update`, `get_seq_length`, `get_mask_sizes`), which is all that blocks and
mask builders use of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache


class Filled(Exception):
    """Raised inside a block, right after it has written its K/V, to leave out the rest of it."""


class KV(Cache):
    """K/V of `layers` blocks for `batch` rows, with room for `capacity` tokens before the buffers grow.

    Attributes:
        column: number of tokens before the ones being run; the next K/V are written from here.
        rows: indices [kept] of the rows being run, or None for all of them.
        stop: leave each block after its K/V are written (raises `Filled`).
        keys, values: per block [batch, kv heads, capacity, head dim], or None before the first write.
    """

    def __init__(self, layers: int, capacity: int, batch: int):
        super().__init__(layers=[])
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.capacity = capacity
        self.column = 0
        self.rows: Tensor | None = None
        self.batch = batch
        self.stop = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Writes K/V [rows, kv heads, tokens, head dim] at `column` and returns those of all tokens so far."""
        end = self.column + key_states.shape[2]
        if self.keys[layer_idx] is None or end > self.keys[layer_idx].shape[2]:
            self._grow(layer_idx, key_states, value_states, end)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self.rows is None:
            keys[:, :, self.column : end] = key_states
            values[:, :, self.column : end] = value_states
        else:
            keys[self.rows, :, self.column : end] = key_states
            values[self.rows, :, self.column : end] = value_states
        if self.stop:
            raise Filled
        keys, values = keys[:, :, :end], values[:, :, :end]
        if self.rows is not None:
            keys, values = keys.index_select(0, self.rows), values.index_select(0, self.rows)
        return keys, values

    def _grow(self, layer: int, key_states: Tensor, value_states: Tensor, end: int) -> None:
        self.capacity = self.capacity if end <= self.capacity else 2 * end
        for buffers, states in ((self.keys, key_states), (self.values, value_states)):
            fresh = states.new_zeros(self.batch, states.shape[1], self.capacity, states.shape[3])
            if buffers[layer] is not None:
                fresh[:, :, : buffers[layer].shape[2]] = buffers[layer]
            buffers[layer] = fresh

    def select(self, kept: Tensor) -> None:
        """Keeps only these rows, for good."""
        self.batch = len(kept)
        self.keys = [None if keys is None else keys[kept] for keys in self.keys]
        self.values = [None if values is None else values[kept] for values in self.values]

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
        end = self.cache.column + key_states.shape[2]
        keys = self.cache.keys[layer_idx - self.offset][:, :, :end]
        values = self.cache.values[layer_idx - self.offset][:, :, :end]
        if self.cache.rows is not None:
            keys, values = keys.index_select(0, self.cache.rows), values.index_select(0, self.cache.rows)
        return keys, values


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
