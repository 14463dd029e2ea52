"""Log-likelihood through the exits: given tokens are scored by the exits that decoding would have left at.

The rule, for one row of context and continuation:

- The context is prefilled at full depth, as a prompt is. Its last position says the first token of the continuation.
- At every scored position the policy is asked as in decoding, and the exit it leaves at gives the log-probability.
- A token that has left carries its state past the skipped blocks, which make their K/V from it: later tokens attend
  to propagated K/V, exactly as in decoding. What is scored is therefore what generation does; a teacher-forced pass
  over exact K/V would flatter early exits.
- An exit that cannot say every entry (a shortlist, or what a screen picks) gives those it can say 1 - `FLOOR` of the
  probability, and spreads `FLOOR` evenly over the others. That is a distribution over the same vocabulary as the full
  model's, so perplexities compare; an entry that cannot be said costs some 17 nats, not infinitely many. Such tokens
  are counted (`unlisted`).

It is one batched pass: block by block over all tokens of the continuation, those that have left keeping their state
(CALM, Schuster et al. 2022, section 3.2, all positions at once). Several policies share the context, and of each row
every segment up to the first one before which they let other tokens out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptive.descent import Descent, Row
from adaptive.policy import BudgetPolicy, ExitPolicy, Trace
from adaptive.tally import caught_up


@dataclass
class Scored:
    """What one policy says of R rows with at most T + 1 scored positions.

    Attributes:
        stem: [R] nats, log-probability of all tokens of the stem.
        last: per row, nats of each alternative for the last token.
        said: [R, T + 1] the likeliest token at every scored position.
        unlisted: [R, T + 1] int, wanted tokens that the exit taken cannot say.
        trace: as decoding would have left it behind.
    """

    stem: np.ndarray
    last: list[np.ndarray]
    said: np.ndarray
    unlisted: np.ndarray
    trace: Trace

    def is_said(self, row: int, text: Row) -> list[bool]:
        """Returns whether greedy decoding would give the stem and then each alternative."""
        length = len(text.stem)
        begun = self.said[row, :length].tolist() == list(text.stem)
        return [begun and int(self.said[row, length]) == token for token in text.last]


@torch.no_grad()
def score(model, rows: Sequence[Row], policies: Sequence[ExitPolicy]) -> list[Scored]:
    """Returns what each policy says of these rows, in one pass as far as they agree.

    Args:
        model: the `EarlyExitModel`.
        rows: texts; contexts and `last` must not be empty.
        policies: who leaves where.

    Raises:
        ValueError: an empty context, no last token, or a budget per request: who may leave then depends on what the
            tokens before did, one after the other.
    """
    if any(isinstance(policy, BudgetPolicy) for policy in policies):
        raise ValueError("a `BudgetPolicy` decides token after token, and all are scored at once; give thresholds")
    if empty := [index for index, row in enumerate(rows) if not len(row.context) or not len(row.last)]:
        raise ValueError(f"rows {empty[:5]} have no context or no last token; give at least one token of each")
    descent = Descent(model, rows, policies)
    descent.run()
    return [_result(descent, out) for out in descent.out]


@torch.no_grad()
def probe(model, rows: Sequence[Row]) -> Trace:
    """Returns the full depth's trace of these rows with `regret`, what every exit would have said: that which
    `generate(probe=True)` gives, for tokens that are given."""
    descent = Descent(model, rows, [ExitPolicy.full(model.num_exits)], probe=True)
    descent.run()
    trace = _result(descent, descent.out[0]).trace
    trace.regret = np.where(trace.valid[..., None], descent.regret.cpu().numpy(), np.nan)
    return trace


def _result(descent: Descent, out: dict[str, Tensor]) -> Scored:
    got = {name: values.cpu().numpy() for name, values in out.items()}
    logprob, lengths = got["logprob"].astype(np.float64), [len(row.stem) for row in descent.rows]
    prompt = np.array([len(row.context) for row in descent.rows])
    trace = Trace(
        exits=descent.depths,
        layers=descent.view.num_layers,
        taken=got["taken"],
        scores=got["scores"],
        context=prompt[:, None] + np.arange(descent.length + 1),
        headed=got["headed"],
        caught_up=caught_up(got["headed"] & descent.owning, prompt),
        prompt=prompt,
    )
    last = [logprob[i, n, : len(row.last)] for i, (n, row) in enumerate(zip(lengths, descent.rows))]
    stem = np.array([logprob[i, :n, 0].sum() for i, n in enumerate(lengths)])
    return Scored(stem, last, got["said"], got["unlisted"], trace)
