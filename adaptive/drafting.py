"""How far a row may draft before the full model judges, and when drafting stops because it does not pay.

A plain function of the row's own trace so far, so that a row does the same alone as in a batch. Time is counted in
weights read, as `costs.py` counts them, by a pass over one token. Attention is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# What a pass takes more as soon as it has several tokens. SmolLM2-135M on a CPU: 2 take 1.6 times as long as one, 3 to
# 9 twice, 17 tokens 2.9 times. In float32, 4 take 1.3 times as long as one, and 8 twice, where `turned.py` turns
# products; where it does not, 2 and 3 take 1.2 times, 4 to 8 1.8 times. An accelerator hardly notices.
SEVERAL, SHARED = 1.0, 0.5
LONGEST = 8  # drafts before the full model judges
CREDIT = 1.0  # tokens at full depth that drafting may cost more than it has saved, before it is given up
PRIOR = (6.0, 7.0)  # drafts kept, and judged, that a row starts with: worth a few tries


class Drafting:
    """Decides for one row.

    Args:
        segments: [exits + 1] weights of the blocks up to each exit from the one before; the last is up to full depth.
        heads: [exits] weights of each exit's gate and head.
        last: weights of the full model's LM head.
        open: [exits] bool, which exits may be taken.
        several: what a pass takes more as soon as it has several tokens.
    """

    def __init__(
        self, segments: Sequence[int], heads: Sequence[int], last: int, open: Sequence[bool], several: float = SEVERAL
    ):
        self.segments, self.heads, self.last = np.asarray(segments, float), np.asarray(heads, float), float(last)
        self.full, self.several = self.segments.sum() + self.last, several
        self.kept, self.judged, self.balance = *PRIOR, 0.0
        # Until something was drafted, the deepest open exit stands for where drafts leave.
        deepest = max((index for index, is_open in enumerate(open) if is_open), default=0)
        self.ran, self.read, self.drafts = self._ran(deepest), self.heads[deepest], 1
        self.limit = self._best()

    def _ran(self, exit: int) -> float:
        return self.segments[: exit + 1].sum()

    def passed(self, taken: int, headed: np.ndarray, behind: np.ndarray) -> None:
        """Notes one pass of the row: where it left, which heads it asked, and who ran with it ([exits] each)."""
        deep = taken == len(self.heads)
        share = 1 + self.several * (np.append(0, behind) > 0)
        self.balance -= (self.segments * share)[: taken + 1].sum() + self.heads[headed].sum()
        if deep:
            self.balance -= self.last * share[-1]
        else:
            self.ran, self.drafts = self.ran + self._ran(taken), self.drafts + 1
            self.read += self.heads[headed].sum()

    def told(self, tokens: int, drafted: int) -> None:
        """Notes the full model's verdict: `tokens` that the row went on by, out of `drafted` and its own one."""
        self.balance += tokens * self.full
        self.kept += tokens - 1
        self.judged += min(tokens, drafted)
        self.limit = self._best()

    def _best(self) -> int:
        """Returns after how many drafts to judge: where most tokens come out for the time; 0 once nothing is gained.
        A row that has proved nothing yet risks one, and one more for every draft of its that was kept."""
        if self.balance < -CREDIT * self.full:
            return 0
        rate, ran, read = self.kept / self.judged, self.ran / self.drafts, self.read / self.drafts
        counts = np.arange(LONGEST + 1)
        took = self.full + counts * (ran + read) + self.several * (self.full - ran) * (counts > 0)
        return min(int(np.argmax(np.cumsum(rate**counts) / took)), 1 + int(self.kept - PRIOR[0]))
