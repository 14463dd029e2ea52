"""What decoding keeps of a batch beside the backbone's K/V: its tokens, and a lane per block head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from adaptive.backbone import Backbone
from adaptive.kv import KV, SharedKV, replace_cache

GROWTH = 256  # columns allocated ahead; buffers double from there


class Tokens:
    """The growing batch: `ids` [batch, length], `mask` (None where nothing is padded) and `positions` beside them."""

    def __init__(self, ids: Tensor, mask: Tensor | None):
        self.ids, self.mask = ids, mask
        padding = torch.zeros(len(ids), dtype=torch.long, device=ids.device) if mask is None else (mask == 0).sum(1)
        self.padding, self.prompt = padding, ids.shape[1] - padding

    @property
    def length(self) -> int:
        """Columns so far, padding included."""
        return self.ids.shape[1]

    @property
    def positions(self) -> Tensor:
        """Position of every token in its row, [batch, length]; padding counts as 0."""
        columns = torch.arange(self.length, device=self.ids.device)
        return (columns[None] - self.padding[:, None]).clamp_min(0)

    @property
    def context(self) -> np.ndarray:
        """Tokens of each row so far [batch], padding left out."""
        return (self.length - self.padding).cpu().numpy()

    def since(self, column: int, rows: np.ndarray) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns ids from `column` on, the mask of all columns, and positions from `column` on, for these rows."""
        index = slice(None) if len(rows) == len(self.ids) else torch.as_tensor(rows, device=self.ids.device)
        return self.ids[index, column:], None if self.mask is None else self.mask[index], self.positions[index, column:]

    def append(self, ids: Tensor) -> None:
        """Adds one token [batch] to every row."""
        self.ids = torch.cat([self.ids, ids[:, None]], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)


class BlockLane:
    """Runs a block head in decoding: over the backbone's K/V, or over its own, filled up to a frontier.

    Args:
        backbone: gives masks and positions.
        head: the block head.
        depth: of the exit.
        own: whether the head has K/V of its own. Its blocks then run over every token that passed it by, all in one
            batch when the head is next asked.
        main: the backbone's K/V.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, depth: int, own: bool, main: KV):
        self.backbone, self.head, self.main = backbone, head, main
        self.shared = None if own else SharedKV(main, backbone.num_layers - depth)
        self.own = KV(backbone.num_layers, main.capacity, main.batch) if own else None
        self.states: Tensor | None = None
        self.frontier = 0

    def keep(self, column: int, rows: np.ndarray | None, states: Tensor) -> None:
        """Keeps states [rows, tokens, hidden] of the tokens from `column` on, for the head to catch up with."""
        if self.own is None:
            return
        end = column + states.shape[1]
        if self.states is None or end > self.states.shape[1]:
            fresh = states.new_zeros(self.main.batch, 2 * end + GROWTH, states.shape[2])
            if self.states is not None:
                fresh[:, : self.states.shape[1]] = self.states
            self.states = fresh
        self.states[slice(None) if rows is None else torch.as_tensor(rows), column:end] = states

    def select(self, kept: Tensor) -> None:
        """Keeps only these rows."""
        if self.own is not None:
            self.own.select(kept)
            self.states = self.states[kept]

    def features(self, state: Tensor, rows: np.ndarray, calls: list, since: Callable) -> tuple[Tensor, int]:
        """Returns the head's normed state [rows, 1, hidden] for the newest token, and how many columns it ran for it.

        Args:
            state: [rows, 1, hidden] at the exit's depth.
            rows: which rows want to know.
            calls: of the backbone's blocks, for these rows.
            since: gives ids, mask and positions of all rows from a column on.
        """
        if self.own is None:
            return self.head(state, [replace_cache(call, self.main, self.shared) for call in calls]), 0
        first, self.frontier = self.frontier, self.main.column + 1
        self.own.column = first
        _, calls = self.backbone.start(*since(first), self.own)
        out = self.head(self.states[:, first : self.frontier], calls)
        return out[torch.as_tensor(rows, device=out.device), -1:], self.frontier - first
