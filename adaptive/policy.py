"""Scores to exits: the policy, and the trace of what it did. Plain numpy, shared by torch and the exported runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ExitPolicy:
    """Says which tokens leave at which exit: those whose score reaches the exit's threshold.

    Attributes:
        thresholds: one per exit, shallowest first. 0 lets every token out, `math.inf` none (the gate is not even
        asked).
    """

    thresholds: tuple[float, ...]

    def __post_init__(self):
        values = tuple(math.inf if t is None else float(t) for t in self.thresholds)
        bad = [t for t in values if math.isnan(t) or t < 0]
        if bad:
            raise ValueError(
                f"`thresholds`={list(self.thresholds)}: {bad} are not allowed; give one number >= 0 per exit, "
                "inf (or null) for an exit that is never taken"
            )
        object.__setattr__(self, "thresholds", values)

    @classmethod
    def full(cls, num_exits: int) -> ExitPolicy:
        """Returns the policy that never leaves early."""
        return cls((math.inf,) * num_exits)

    @classmethod
    def always(cls, exit: int, num_exits: int) -> ExitPolicy:
        """Returns the policy under which every token leaves at one exit: a static sub-model."""
        return cls(tuple(0.0 if index == exit else math.inf for index in range(num_exits)))

    def asks(self, exit: int) -> bool:
        """Returns whether the gate of `exit` can let anything out."""
        return self.thresholds[exit] != math.inf

    def leaves(self, exit: int, scores):
        """Returns a boolean array or tensor: which of `scores` let their token out at `exit`."""
        return scores >= self.thresholds[exit]

    def choose(self, scores: np.ndarray) -> np.ndarray:
        """Returns the exit taken per token [tokens] from scores [tokens, exits]; the number of exits means full
        depth."""
        out = scores >= np.asarray(self.thresholds)
        return np.where(out.any(axis=1), out.argmax(axis=1), len(self.thresholds))


@dataclass
class Trace:
    """What decoding did, per row and generated token. Made by decoding, priced by `costs.py`, read by everything else.

    Attributes:
        exits: depth of each exit, shallowest first.
        layers: depth of the full model.
        taken: [rows, tokens] int, index of the exit taken; `len(exits)` is the full depth, -1 a row that had ended.
        scores: [rows, tokens, exits] float, what each gate said; NaN where it was not asked.
        context: [rows, tokens] int, tokens attended to, the token's own included.
        headed: [rows, tokens, exits] bool, whether the head of that exit was evaluated.
        caught_up: [rows, tokens, exits] int, states of earlier tokens run through a block head to fill its own K/V.
        prompt: [rows] int, prompt tokens (prefilled at full depth).
        regret: [rows, tokens, exits] float, nats the full model would lose by taking each exit's token; None
        unless probed.
    """

    exits: tuple[int, ...]
    layers: int
    taken: np.ndarray
    scores: np.ndarray
    context: np.ndarray
    headed: np.ndarray
    caught_up: np.ndarray
    prompt: np.ndarray
    regret: np.ndarray | None = None

    @property
    def depth(self) -> np.ndarray:
        """Depth of every token [rows, tokens]; 0 where a row had ended."""
        depths = np.asarray((*self.exits, self.layers, 0))
        return depths[self.taken]

    @property
    def valid(self) -> np.ndarray:
        """Which entries are tokens and not the tail of an ended row, [rows, tokens] bool."""
        return self.taken >= 0

    @property
    def mean_depth(self) -> float:
        """Mean depth over all generated tokens, in blocks."""
        return float(self.depth[self.valid].mean())

    @property
    def shares(self) -> list[float]:
        """Share of tokens that left at each exit; the full depth last."""
        taken = self.taken[self.valid]
        return [float((taken == index).mean()) for index in range(len(self.exits) + 1)]

    @classmethod
    def join(cls, traces: Sequence[Trace]) -> Trace:
        """Returns one trace holding the rows of several, padded to the longest."""
        longest = max(trace.taken.shape[1] for trace in traces)

        def stack(name: str, empty) -> np.ndarray:
            arrays = [getattr(trace, name) for trace in traces]
            return np.concatenate(
                [
                    np.pad(a, [(0, 0), (0, longest - a.shape[1])] + [(0, 0)] * (a.ndim - 2), constant_values=empty)
                    for a in arrays
                ]
            )

        first = traces[0]
        return cls(
            first.exits,
            first.layers,
            stack("taken", -1),
            stack("scores", np.nan),
            stack("context", 0),
            stack("headed", False),
            stack("caught_up", 0),
            np.concatenate([t.prompt for t in traces]),
            None if first.regret is None else stack("regret", np.nan),
        )
