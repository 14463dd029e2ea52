"""What an evaluation cost, as sums that add up over batches, tasks and processes; in the end, the trace statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from adaptive.costs import Costs
from adaptive.policy import Trace


@dataclass
class Tally:
    """Sums over the tokens of any number of traces of one model.

    Attributes:
        depths: of the exits and of the full model, shallowest first.
        taken: tokens that left at each of them.
        flops, full_flops, bytes, full_bytes: as `costs.Price` has them.
        unlisted: tokens to be scored that the exit taken cannot say.
        generated: tokens that were generated while the clock ran; the others were given, or generated with others'.
        seconds: taken to generate them.
    """

    depths: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    flops: int = 0
    full_flops: int = 0
    bytes: int = 0
    full_bytes: int = 0
    unlisted: int = 0
    generated: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, trace: Trace, costs: Costs, unlisted: int = 0, seconds: float | None = None) -> Tally:
        """Returns the tally of one trace; `seconds` if its generation was timed."""
        price = costs.price(trace)
        taken = np.bincount(trace.taken[trace.valid], minlength=len(trace.exits) + 1).tolist()
        return cls(
            depths=[*trace.exits, trace.layers],
            taken=taken,
            flops=int(price.flops.sum()),
            full_flops=int(price.full_flops.sum()),
            bytes=int(price.bytes.sum()),
            full_bytes=int(price.full_bytes.sum()),
            unlisted=int(unlisted),
            generated=0 if seconds is None else sum(taken),
            seconds=seconds or 0.0,
        )

    def __add__(self, other: Tally) -> Tally:
        if not self.depths or not other.depths:
            return other if other.depths else self
        assert self.depths == other.depths, "tallies of one model"
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Tally(**sums | {"depths": self.depths, "taken": [a + b for a, b in zip(self.taken, other.taken)]})

    @classmethod
    def sum(cls, tallies: Sequence[Tally]) -> Tally:
        """Returns the sum of tallies."""
        return sum(tallies, cls())

    def summary(self) -> dict | None:
        """Returns the trace statistics, None of no tokens: `tokens`, `mean_depth` in blocks, `histogram` (depth and
        share of the tokens, in order), `relative_flops`, `relative_bytes`, `unlisted` (share), `tokens_per_second` of
        those generated with a clock, at the batch size used, prefill included, or None."""
        count = sum(self.taken)
        if not count:
            return None
        return {
            "tokens": count,
            "mean_depth": sum(depth * n for depth, n in zip(self.depths, self.taken)) / count,
            "histogram": [[depth, n / count] for depth, n in zip(self.depths, self.taken)],
            "relative_flops": self.flops / self.full_flops,
            "relative_bytes": self.bytes / self.full_bytes,
            "unlisted": self.unlisted / count,
            "tokens_per_second": self.generated / self.seconds if self.seconds else None,
        }


def oracle(trace: Trace) -> Trace:
    """Returns the trace of somebody who knows, from a probed one: each token leaves at the first exit that already
    says the full model's best token, and no gate is asked. No policy saves more without changing a greedy token."""
    agrees = trace.regret <= 0  # NaN, where a row had ended, is not
    first = np.where(agrees.any(-1), agrees.argmax(-1), len(trace.exits))
    taken = np.where(trace.valid, first, -1)
    headed = taken[..., None] == np.arange(len(trace.exits))
    nothing = np.full(trace.scores.shape, np.nan, np.float32)
    return dataclasses.replace(
        trace, taken=taken, scores=nothing, headed=headed, caught_up=caught_up(headed, trace.prompt), regret=None
    )


def caught_up(headed: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Returns how many columns [rows, tokens, exits] a block head with K/V of its own runs when it is next read, in a
    row alone in its batch. Heads without them do not catch up; `costs.py` does not look at theirs."""
    out = np.zeros(headed.shape, np.int32)
    for row, column, exit in np.argwhere(headed):
        out[row, column, exit] = prompt[row] + column - out[row, :column, exit].sum()
    return out
