"""The trace in the making: a column for every step, an entry for every row of the batch."""

from __future__ import annotations

import numpy as np

from adaptive.lanes import Tokens
from adaptive.policy import EMPTY, Progress, Trace


class Record:
    """What a walk writes down, step by step.

    Args:
        depths: of the exits, shallowest first.
        layers: depth of the full model.
        tokens: the batch, prompts so far.
        probe: whether the regret of each exit is written down, too.

    Attributes:
        now: the open column: arrays that begin with [batch], named as in `Trace`.
        columns: those that are closed.
        caught: [exits, batch], columns that a head with K/V of its own has run for a row.
    """

    def __init__(self, depths: tuple[int, ...], layers: int, tokens: Tokens, probe: bool):
        self.depths, self.layers, self.tokens, self.probe = depths, layers, tokens, probe
        self.stops = (*depths, layers)
        self.columns: list[dict[str, np.ndarray]] = []
        self.blocks = np.zeros(len(tokens.ids), np.int64)
        self.caught = np.zeros((len(depths), len(tokens.ids)), np.int64)

    def open(self) -> dict[str, np.ndarray]:
        """Opens and returns the column of the newest tokens."""
        batch, count = len(self.blocks), len(self.depths)
        self.now = {
            "taken": np.full(batch, -1, np.int16),
            "scores": np.full((batch, count), np.nan, np.float32),
            "context": self.tokens.context,
            "headed": np.zeros((batch, count), bool),
            "caught_up": np.zeros((batch, count), np.int32),
            "behind": np.zeros((batch, count), np.int32),
        }
        if self.probe:
            self.now["regret"] = np.full((batch, count), np.nan, np.float32)
        return self.now

    def close(self, live: np.ndarray) -> None:
        """Closes the column; what it says of other rows than `live` is forgotten, as they have ended."""
        self.blocks += np.asarray((*self.stops, 0))[self.now["taken"]]
        ended = np.ones(len(self.blocks), bool)
        ended[live] = False
        for name, values in self.now.items():
            values[ended] = EMPTY.get(name, 0)
        self.columns.append(self.now)

    def catch_up(self, exit: int, who: np.ndarray) -> None:
        """Notes that a head with K/V of its own runs whatever it has not yet run for these rows."""
        self.now["caught_up"][who, exit] = self.tokens.length - self.caught[exit, who]
        self.caught[exit, who] = self.tokens.length

    def rewind(self, row: int, end: int, by: int) -> None:
        """Forgets what heads ran behind the first `end` columns of a row, which move to the right."""
        self.caught[:, row] = np.minimum(self.caught[:, row], end) + by

    def progress(self, who: np.ndarray) -> Progress:
        """Returns what has become of these rows so far."""
        tokens = self.now["context"][who] - self.tokens.prompt[who]
        return Progress(self.stops, tokens, self.blocks[who])

    def trace(self, kv: str) -> Trace:
        """Returns all closed columns, one entry per row and step."""
        stack = {name: np.stack([column[name] for column in self.columns], axis=1) for name in self.columns[0]}
        return Trace(exits=self.depths, layers=self.layers, prompt=self.tokens.prompt, kv=kv, **stack)
