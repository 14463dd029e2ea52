"""What decoding keeps of a batch beside the backbone's K/V: its tokens, and who waits in front of which blocks.

Rows are aligned at the right: the newest token of each is in the same column, and what a row lacks is padding on its
left. Behind that column every lane has a frontier per row: the first token that has not been through its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from adaptive.backbone import Backbone
from adaptive.kv import KV, SharedKV, replace_cache

GROWTH = 256  # columns allocated ahead; buffers double from there
SCATTER = 2**14  # most pairs of a scattered token and a column it may see: their K/V are copied


class Tokens:
    """The growing batch: `ids` [batch, length]; `padding` [batch], columns on the left of each row; `prompt` [batch],
    tokens of each row's prompt."""

    def __init__(self, ids: Tensor, mask: Tensor | None):
        self.ids, self.width = ids, ids.shape[1]
        self.padding = np.zeros(len(ids), np.int64) if mask is None else (mask == 0).sum(1).cpu().numpy()
        self.given = self.padding.copy()  # padding that the caller gave; the rest is ours
        self.prompt = self.width - self.padding

    @property
    def length(self) -> int:
        """Columns so far, padding included."""
        return self.ids.shape[1]

    @property
    def context(self) -> np.ndarray:
        """Tokens of each row so far [batch], padding left out."""
        return self.length - self.padding

    def row(self, row: int, length: int) -> Tensor:
        """Returns the ids [1, columns] of a row up to column `length`, with the padding that the caller gave."""
        return self.ids[row : row + 1, self.padding[row] - self.given[row] : length]

    def since(self, first: int, rows: np.ndarray) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns ids from column `first` on, the mask of all columns, and positions from `first` on, of some rows."""
        device = self.ids.device
        ids = at(self.ids[:, first:], rows)
        padding, columns = self.padding[rows], torch.arange(self.length, device=device)
        if not padding.any():
            return ids, None, columns[first:].expand(len(rows), -1)
        padding = torch.as_tensor(padding, device=device)[:, None]
        return ids, (columns >= padding).long(), (columns[first:] - padding).clamp_min(0)

    def at(self, rows: np.ndarray, columns: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids [tokens, 1], mask [tokens, length] aligned at the right, and positions [tokens, 1] of single
        tokens."""
        device = self.ids.device
        ids = self.ids[torch.as_tensor(rows, device=device), torch.as_tensor(columns, device=device)]
        positions = torch.as_tensor(columns - self.padding[rows], device=device)[:, None].clamp_min(0)
        mask = torch.arange(self.length, device=device) >= self.length - 1 - positions
        return ids[:, None], mask.long(), positions

    def append(self, ids: Tensor) -> None:
        """Adds one token [batch] to every row."""
        self.ids = torch.cat([self.ids, ids[:, None]], dim=1)

    def shift(self, row: int, by: int, end: int) -> None:
        """Moves the first `end` columns of a row to the right, and the row's padding grows."""
        self.ids[row, by : end + by] = self.ids[row, :end].clone()
        self.padding[row] += by


@dataclass(frozen=True)
class Cells:
    """The tokens of one pass: of every row those from its `first` column to the newest one.

    Equal widths make a rectangle [rows, width]; otherwise every token is a batch entry of its own, [tokens, 1]: no row
    computes what only its neighbours need.

    Attributes:
        rows: [rows] of the K/V, ascending.
        first: [rows], first column of each.
        last: the newest column, of all.
    """

    rows: np.ndarray
    first: np.ndarray
    last: int

    @cached_property
    def widths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.last + 1 - self.first

    @cached_property
    def even(self) -> bool:
        """Whether the tokens form a rectangle."""
        return bool((self.first == self.first[0]).all())

    @cached_property
    def spread(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of every token, row by row."""
        rows = np.repeat(self.rows, self.widths)
        starts = np.cumsum(self.widths) - self.widths
        return rows, np.arange(len(rows)) - np.repeat(starts - self.first, self.widths)

    def _where(self, device) -> tuple:
        if self.even:
            return torch.as_tensor(self.rows, device=device), slice(int(self.first[0]), self.last + 1)
        return tuple(torch.as_tensor(index, device=device) for index in self.spread)

    def take(self, states: Tensor) -> Tensor:
        """Returns the states of these tokens out of those of all [members, columns, hidden]."""
        out = states[self._where(states.device)]
        return out if self.even else out[:, None]

    def put(self, values: Tensor, states: Tensor) -> None:
        """Writes the states of these tokens, as `take` gives them, into those of all."""
        states[self._where(states.device)] = values if self.even else values[:, 0]

    def newest(self, values: Tensor) -> Tensor:
        """Returns the states [rows, 1, hidden] of each row's newest token."""
        if self.even:
            return values[:, -1:]
        return values[torch.as_tensor(np.cumsum(self.widths) - 1, device=values.device)]

    def flat(self, values: Tensor) -> Tensor:
        """Returns the states [tokens, hidden], row by row."""
        return values.reshape(-1, values.shape[-1])

    def shaped(self, values: Tensor) -> Tensor:
        """Returns what `flat` gave, back in the form of the pass."""
        return values.reshape(len(self.rows), -1, values.shape[-1]) if self.even else values[:, None]

    def start(self, backbone: Backbone, tokens: Tokens, members: np.ndarray, cache: KV) -> list:
        """Points the K/V at these tokens and returns the block calls for them; `members` are the batch's rows in it."""
        device = tokens.ids.device
        cache.rows, cache.cells = None, None
        if self.even:
            cache.column = int(self.first[0])
            if len(self.rows) < cache.batch:
                cache.rows = torch.as_tensor(self.rows, device=device)
            return backbone.start(*tokens.since(cache.column, members[self.rows]), cache)[1]
        cache.column = self.last
        rows, columns = self._where(device)
        seen = columns[:, None] - torch.arange(self.last, -1, -1, device=device)
        cache.cells = rows, columns, seen.clamp_min(0)
        return backbone.start(*tokens.at(members[self.spread[0]], self.spread[1]), cache)[1]


class Lane:
    """Where tokens wait in front of some blocks until a later token of their row goes on: a frontier per row.

    Args:
        cache: the K/V that the blocks write.
        frontier: [members] first column of each row that has not been through the blocks.
    """

    def __init__(self, cache: KV, frontier: np.ndarray):
        self.cache, self.frontier = cache, frontier.copy()
        self.states: Tensor | None = None

    def keep(self, cells: Cells, states: Tensor) -> None:
        """Keeps the states of these tokens in front of the blocks."""
        self._reserve(cells.last + 1, states)
        cells.put(states, self.states)

    def _reserve(self, end: int, states: Tensor) -> None:
        if self.states is None or end > self.states.shape[1]:
            fresh = states.new_zeros(self.cache.batch, 2 * end + GROWTH, states.shape[2])
            if self.states is not None:
                fresh[:, : self.states.shape[1]] = self.states
            self.states = fresh

    def waiting(self, rows: np.ndarray, last: int) -> list[Cells]:
        """Returns the passes that take these rows through the blocks, newest token included, and moves their frontier.

        One pass if all wait for equally long, or if few wait; else one for each length, as a prompt's would be copied
        too often.
        """
        first = self.frontier[rows]
        self.frontier[rows] = last + 1
        cells = Cells(rows, first, last)
        if cells.even or cells.widths.sum() * (last + 1) <= SCATTER:
            return [cells]
        return [Cells(rows[first == column], first[first == column], last) for column in np.unique(first)]

    def select(self, kept: np.ndarray) -> None:
        """Keeps only these rows."""
        self.frontier = self.frontier[kept]
        if self.states is not None:
            self.states = self.states[torch.as_tensor(kept, device=self.states.device)]

    def rewind(self, row: int, end: int, by: int) -> None:
        """Forgets a row's columns from `end` on, and moves the others to the right."""
        self.frontier[row] = min(self.frontier[row], end) + by
        if by and self.states is not None:
            self._reserve(end + by, self.states)
            self.states[row, by : end + by] = self.states[row, :end].clone()


def at(values: Tensor, places: np.ndarray) -> Tensor:
    """Returns values[places], which is no copy where these are all."""
    if len(places) == len(values) and (places == np.arange(len(places))).all():
        return values
    return values[torch.as_tensor(places, device=values.device)]


def gather(done: list[tuple[Cells, Tensor]], rows: np.ndarray) -> Tensor:
    """Returns the states [rows, 1, hidden] of the newest tokens out of those of some passes."""
    if len(done) == 1:
        return done[0][0].newest(done[0][1])
    out = done[0][1].new_empty(len(rows), 1, done[0][1].shape[-1])
    for cells, states in done:
        out[torch.as_tensor(np.searchsorted(rows, cells.rows), device=out.device)] = cells.newest(states)
    return out


class BlockLane:
    """Runs a block head in decoding: over the backbone's K/V, or over its own, filled up to a frontier per row.

    Args:
        backbone: gives masks and positions.
        head: the block head.
        depth: of the exit.
        own: whether the head has K/V of its own. Its blocks then run over every token that passed it by, when the head
            is next asked.
        main: the backbone's K/V.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, depth: int, own: bool, main: KV):
        self.backbone, self.head, self.main = backbone, head, main
        self.shared = None if own else SharedKV(main, backbone.num_layers - depth)
        self.lane = None
        if own:
            cache = KV(backbone.num_layers, main.capacity, main.batch)
            self.lane = Lane(cache, np.zeros(main.batch, np.int64))

    def select(self, kept: np.ndarray) -> None:
        """Keeps only these rows."""
        if self.lane is not None:
            end = int(self.lane.frontier.max())
            self.lane.cache.select(torch.as_tensor(kept, device=self.backbone.device), end)
            self.lane.select(kept)

    def repeat(self, rows: np.ndarray) -> None:
        """Adds copies of these rows behind the others."""
        if self.lane is not None:
            before, end = self.lane.cache.batch, int(self.lane.frontier.max())
            self.lane.cache.repeat(torch.as_tensor(rows, device=self.backbone.device), end)
            self.lane.select(np.concatenate([np.arange(before), rows]))

    def shared_features(self, state: Tensor, calls: list) -> Tensor:
        """Returns the normed state [rows, 1, hidden] of a head on the backbone's K/V, for the newest tokens.

        Args:
            state: [rows, 1, hidden] at the exit's depth.
            calls: of the backbone's blocks, for these rows.
        """
        return self.head(state, [replace_cache(call, self.main, self.shared) for call in calls])

    def own_features(self, rows: np.ndarray, tokens: Tokens, members: np.ndarray) -> Tensor:
        """Returns the normed state [rows, 1, hidden] of a head with K/V of its own."""
        newest, done = tokens.length - 1, []
        for cells in self.lane.waiting(rows, newest):
            calls = cells.start(self.backbone, tokens, members, self.lane.cache)
            done.append((cells, self.head(cells.take(self.lane.states), calls)))
        return gather(done, rows)
