"""Who is in a batch: under which policy, and on whose keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from adaptive.lanes import Tokens
from adaptive.policy import ExitPolicy


class Members:
    """Which rows of the batch each row of the K/V is of: several, for as long as their tokens and K/V are the same.

    Args:
        tokens: the batch, prompts so far.
        share: whether rows with the same prompt begin as one; else every row has its own.

    Attributes:
        lead: [members], a row of the batch for each row of the K/V.
        home: [batch], the row of the K/V of each row of the batch; -1 once it has ended.
    """

    def __init__(self, tokens: Tokens, share: bool):
        self.lead, self.home = np.arange(len(tokens.ids)), np.arange(len(tokens.ids))
        if share and len(tokens.ids) > 1:
            ids = np.where(np.arange(tokens.length) < tokens.padding[:, None], -1, tokens.ids.cpu().numpy())
            _, first, group = np.unique(ids, axis=0, return_index=True, return_inverse=True)
            self.lead = np.sort(first)
            self.home = np.searchsorted(self.lead, first)[group.reshape(-1)]

    def __len__(self) -> int:
        return len(self.lead)

    def riders(self, rows: np.ndarray, waiting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of the batch on these `rows` of the K/V, as far as they are `waiting` [batch] bool, and the
        place of each one's in `rows`."""
        place = np.full(len(self.lead) + 1, -1)
        place[rows] = np.arange(len(rows))
        places = place[self.home]  # the last entry is that of rows that have ended
        who = np.flatnonzero(waiting & (places >= 0))
        return who, places[who]

    def settle(self, live: np.ndarray) -> None:
        """Sees to it that rows of the batch that have ended ride nowhere, but on K/V that nobody else needs."""
        self.lead[self.home[live]] = live
        ended = self.lead[self.home] != np.arange(len(self.home))
        ended[live] = False
        self.home[ended] = -1

    def split(self, who: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Puts rows of the batch on new rows of the K/V, one for each label, in their order; returns whose copies these
        have to be."""
        _, first, group = np.unique(labels, return_index=True, return_inverse=True)
        sources = self.home[who[first]]
        self.home[who] = len(self.lead) + group
        self.lead = np.concatenate([self.lead, who[first]])
        return sources

    def select(self, kept: np.ndarray) -> None:
        """Keeps only these rows of the K/V."""
        place = np.full(len(self.lead) + 1, -1)
        place[kept] = np.arange(len(kept))
        self.lead, self.home = self.lead[kept], place[self.home]


class Policies:
    """The policy of every row of a batch.

    Args:
        given: one for all rows, or one for each.
        batch: number of rows.
    """

    def __init__(self, given: ExitPolicy | Sequence[ExitPolicy], batch: int):
        given = [given] * batch if isinstance(given, ExitPolicy) else given
        self.distinct = list(dict.fromkeys(given))
        self.whose = np.array([self.distinct.index(policy) for policy in given])

    def asks(self, exit: int) -> np.ndarray:
        """Returns for which rows the gate of `exit` can let anything out, [batch] bool."""
        return np.array([policy.asks(exit) for policy in self.distinct])[self.whose]

    def leaves(self, exit: int, scores: np.ndarray, who: np.ndarray, progress: Callable) -> np.ndarray:
        """Returns which of the rows `who` are let out at `exit`, [rows] bool.

        Args:
            exit: index of the exit.
            scores: [rows], what its gate said.
            who: rows of the batch.
            progress: gives the `Progress` of rows of the batch.
        """
        left = np.zeros(len(who), bool)
        for number, policy in enumerate(self.distinct):
            mine = np.flatnonzero(self.whose[who] == number)
            if len(mine):
                left[mine] = policy.leaves(exit, scores[mine], progress(who[mine]))
        return left
