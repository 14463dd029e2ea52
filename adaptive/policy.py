"""Scores to exits: the policy, and the trace of what it did. Plain numpy, shared by torch and the exported runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Progress:
    """What has become of some rows so far, for policies that look back.

    Attributes:
        depths: of the exits, shallowest first, and of the full model.
        tokens: [rows] tokens that each row has generated.
        blocks: [rows] blocks that it was let out behind, summed over them.
    """

    depths: tuple[int, ...]
    tokens: np.ndarray
    blocks: np.ndarray


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

    def leaves(self, exit: int, scores: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """Returns which of `scores` [rows] let their token out at `exit`, [rows] bool.

        Args:
            exit: index of the exit.
            scores: what its gate said.
            progress: of the rows so far; thresholds alone do not need it.
        """
        return scores >= self.thresholds[exit]

    def choose(self, scores: np.ndarray) -> np.ndarray:
        """Returns the exit taken per token [tokens] from scores [tokens, exits]; the number of exits means full
        depth."""
        out = scores >= np.asarray(self.thresholds)
        return np.where(out.any(axis=1), out.argmax(axis=1), len(self.thresholds))


@dataclass(frozen=True)
class DecayingPolicy(ExitPolicy):
    """Careful at first, bolder later: a threshold t becomes clip(0.9 t + 0.1 exp(-rate i / length), 0, 1) at token i
    (the decaying threshold of CALM, Schuster et al. 2022): all later tokens follow an early error.

    Attributes:
        rate: how fast thresholds fall; CALM uses 4.
        length: of an answer, in tokens.
    """

    rate: float = 4.0
    length: int = 128

    def __post_init__(self):
        super().__post_init__()
        if not self.rate >= 0 or self.length < 1:
            raise ValueError(f"`rate`={self.rate}, `length`={self.length}: give a rate >= 0 and a length >= 1")

    def leaves(self, exit: int, scores: np.ndarray, progress: Progress) -> np.ndarray:
        """Returns which of `scores` [rows] let their token out at `exit`, [rows] bool."""
        extra = 0.1 * np.exp(-self.rate * progress.tokens / self.length)
        return scores >= np.clip(0.9 * self.thresholds[exit] + extra, 0, 1)


@dataclass(frozen=True)
class BudgetPolicy(ExitPolicy):
    """Thresholds, and for each request a mean depth that is never exceeded: a token that could take its row above it
    leaves, whatever its score.

    Attributes:
        mean_depth: blocks per generated token, at most; at least the depth of the first open exit.
    """

    mean_depth: float = math.inf

    def __post_init__(self):
        super().__post_init__()
        if not self.mean_depth > 0 or self.mean_depth < math.inf and set(self.thresholds) <= {math.inf}:
            raise ValueError(
                f"`mean_depth`={self.mean_depth}, `thresholds`={list(self.thresholds)}: give a mean depth above 0, and "
                "where it is finite a finite threshold for at least one exit, or nobody could keep to it"
            )

    def leaves(self, exit: int, scores: np.ndarray, progress: Progress) -> np.ndarray:
        """Returns which of `scores` [rows] let their token out at `exit`, [rows] bool.

        Raises:
            ValueError: not even leaving at the first open exit keeps to the budget.
        """
        is_open = [index for index in range(len(self.thresholds)) if self.asks(index)]
        if progress.depths[is_open[0]] > self.mean_depth:
            raise ValueError(
                f"`mean_depth`={self.mean_depth}: the first open exit is at depth {progress.depths[is_open[0]]}; allow "
                "at least that, or open an earlier one"
            )
        # Going on, a token comes as far as the next open exit, where it can be let out again.
        further = progress.depths[next((index for index in is_open if index > exit), len(self.thresholds))]
        return (scores >= self.thresholds[exit]) | (progress.blocks + further > self.mean_depth * (progress.tokens + 1))


EMPTY = {"taken": -1, "scores": np.nan, "regret": np.nan}  # of a row that had ended; 0 for all else


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
        caught_up: [rows, tokens, exits] int, tokens run through a block head with K/V of its own, this one included.
        prompt: [rows] int, prompt tokens (prefilled at full depth).
        regret: [rows, tokens, exits] float, nats the full model would lose by taking each exit's token; None
            unless probed.
        behind: [rows, tokens, exits] int, tokens of the row that had been let out, at that exit or before, and now ran
            through the blocks from there to the next one: earlier ones, which had waited, and, where it left before
            these blocks, this one. None (for 0) where nothing waits.
        kv: what became of the blocks beyond an exit: "propagate", "recompute" or "verify".
        accepted: [rows, tokens] bool, False where the full model put another token in place of a draft; None unless
            `kv` is "verify". Drafts are the tokens that were let out at an exit.
        rejected: what was done for drafts that followed a wrong one, and thrown away; None unless `kv` is "verify".
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
    behind: np.ndarray | None = None
    kv: str = "propagate"
    accepted: np.ndarray | None = None
    rejected: Trace | None = None

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
    def drafted(self) -> np.ndarray:
        """Which tokens were let out at an exit, [rows, tokens] bool."""
        return self.valid & (self.taken < len(self.exits))

    @property
    def mean_depth(self) -> float:
        """Mean depth over all generated tokens, in blocks; under "verify", of the drafts before they were judged."""
        return float(self.depth[self.valid].mean())

    @property
    def shares(self) -> list[float]:
        """Share of tokens that left at each exit; the full depth last."""
        taken = self.taken[self.valid]
        return [float((taken == index).mean()) for index in range(len(self.exits) + 1)]

    @property
    def acceptance(self) -> float:
        """Share of the judged drafts that the full model kept ("verify"); NaN where nothing was drafted."""
        return float(self.accepted[self.drafted].mean()) if self.drafted.any() else math.nan

    def picked(self, mask: np.ndarray) -> Trace:
        """Returns the entries where `mask` [rows, tokens], each row's moved together at its left."""
        counts = mask.sum(axis=1)
        order = np.argsort(~mask, axis=1, kind="stable")[:, : max(1, counts.max())]
        tail = np.arange(order.shape[1]) >= counts[:, None]

        def pick(name: str) -> np.ndarray | None:
            """Returns the entries of an array."""
            if (array := getattr(self, name)) is None:
                return None
            out = np.take_along_axis(array, order.reshape(*order.shape, *[1] * (array.ndim - 2)), axis=1)
            out[tail] = EMPTY.get(name, 0)
            return out

        return replace(self, **{name: pick(name) for name in ENTRIES}, rejected=None)

    def part(self, rows: slice) -> Trace:
        """Returns the trace of some rows, up to the last token that one of them has."""
        longest = max(1, int(self.valid[rows].sum(axis=1).max()))

        def cut(name: str) -> np.ndarray | None:
            """Returns the part of an array."""
            return None if (array := getattr(self, name)) is None else array[rows, :longest]

        return replace(self, **{name: cut(name) for name in ENTRIES}, prompt=self.prompt[rows], rejected=None)

    @classmethod
    def join(cls, traces: Sequence[Trace]) -> Trace:
        """Returns one trace holding the rows of several, padded to the longest."""
        longest = max(trace.taken.shape[1] for trace in traces)

        def stack(name: str) -> np.ndarray | None:
            """Returns an array of all traces."""
            arrays = [getattr(trace, name) for trace in traces]
            if any(array is None for array in arrays):
                return None
            widths = [[(0, 0), (0, longest - a.shape[1])] + [(0, 0)] * (a.ndim - 2) for a in arrays]
            empty = EMPTY.get(name, 0)
            return np.concatenate([np.pad(a, w, constant_values=empty) for a, w in zip(arrays, widths, strict=True)])

        thrown = [trace.rejected for trace in traces]
        return replace(
            traces[0],
            **{name: stack(name) for name in ENTRIES},
            prompt=np.concatenate([trace.prompt for trace in traces]),
            rejected=None if None in thrown else cls.join(thrown),
        )


ENTRIES = ("taken", "scores", "context", "headed", "caught_up", "regret", "behind", "accepted")
