"""Lossless speculation: tokens said at an exit are drafts, which the full depth judges in one pass.

The gates decide where a draft leaves, and drafting ends with the first token that no gate lets out: it goes on to the
full depth together with all drafts that wait, over the same K/V. What is kept is what the full model would have said:
greedily token for token, sampled in distribution. (LayerSkip, Elhoushi et al. 2024, section 4.3, shares K/V so at one
fixed exit; Draft & Verify, Zhang et al. 2023, stops drafting by confidence.)

Rows advance by different numbers of tokens; after a judgement they are aligned again by moving rows to the right.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PrefixConstrainedLogitsProcessor

from adaptive.drafting import Drafting
from adaptive.exits import widened
from adaptive.policy import Trace
from adaptive.sampling import draw, judge, lost
from adaptive.walk import Walk


@dataclass
class Row:
    """One row of the batch.

    Attributes:
        index: in the batch.
        plan: how far it may draft.
        source: what it samples from; None for greedy.
        processors: of logits, as they would be for the row alone.
        said: new ids that are certain.
        drafts, proposed: ids that wait for judgement, and the probabilities [vocabulary] they were drawn from.
        steps: columns of the walk's trace since the last judgement.
        due: whether its newest draft would end it.
        ended: whether it has ended.
        guesses: scores [vocabulary] that the drafts came from, if asked for.
        scores, logits: [vocabulary] of every token said, if asked for.
    """

    index: int
    plan: Drafting
    source: torch.Generator | None
    processors: list
    said: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    proposed: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    due: bool = False
    ended: bool = False
    guesses: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class Speculation:
    """Generates with drafts.

    Args:
        walk: whose `kv` is "verify".
        processors, criteria: as `generate` prepared them; called on one row at a time, and for drafts, too: they must
            not keep state from one call to the next.
        config: the generation config.
        sources: a generator per row, or None for greedy.
        plans: a `Drafting` per row.
        streamer: gets every column of new ids once all rows have come past it.
    """

    def __init__(self, walk: Walk, processors, criteria, config, sources, plans: list[Drafting], streamer=None):
        self.walk, self.tokens, self.criteria = walk, walk.tokens, criteria
        wanted = config.return_dict_in_generate
        self.keep_scores, self.keep_logits = wanted and config.output_scores, wanted and config.output_logits
        self.pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        self.copies = len(self.tokens.ids) if any(map(_foreign, criteria)) else 1
        self.streamer, self.streamed, self.prompt = streamer, 0, walk.tokens.ids
        self.most = config.max_length - self.prompt.shape[1]
        sources = sources or [None] * len(self.prompt)
        self.rows = [
            Row(i, plan, source, _alone(processors, i, len(sources)))
            for i, (plan, source) in enumerate(zip(plans, sources, strict=True))
        ]

    def run(self) -> tuple[Tensor, tuple | None, tuple | None]:
        """Returns ids [batch, prompt + new], and per new token scores and logits [batch, vocabulary] if asked for."""
        live, logits = list(self.rows), self.walk.prefill()
        while True:
            self._advance(live, logits)
            self._stream()
            live = [row for row in live if not row.ended]
            if not live:
                break
            if not any(row.plan.limit or row.drafts for row in live):
                self.walk.asked = [False] * len(self.walk.asked)  # who has given up drafting does not come back to it
            due = np.array([self._due(row) for row in live])
            logits = self.walk.step(np.array([row.index for row in live]), due)
        if self.streamer is not None:
            self.streamer.end()
        longest = max(len(row.said) for row in self.rows)
        new = torch.tensor([row.said + [self.pad] * (longest - len(row.said)) for row in self.rows])
        ids = torch.cat([self.prompt, new.to(self.prompt.device)], dim=1)
        return ids, self._stacked("scores", self.keep_scores), self._stacked("logits", self.keep_logits)

    def trace(self) -> Trace:
        """Returns the trace of the tokens said, with that of the drafts thrown away."""
        whole = self.walk.record.trace("verify")
        kept, steps = whole.accepted >= 0, whole.valid
        whole.accepted = whole.accepted > 0
        out = whole.picked(kept & steps)
        out.rejected = whole.picked(~kept & steps)
        return out

    def _advance(self, live: list[Row], logits: Tensor) -> None:
        """Takes in one step of the walk: a draft more, or a judgement, for every live row; then aligns the rows."""
        walk, column = self.walk, self.tokens.length
        now = walk.record.columns[-1]
        now["accepted"] = np.full(len(self.rows), -1, np.int8)  # -1 until the token is certain
        judged = self._judged()
        ends, newest = [], []
        for place, row in enumerate(live):
            row.steps.append(len(walk.record.columns) - 1)
            row.plan.passed(*(now[name][row.index] for name in ("taken", "headed", "behind")))
            if place in judged:
                end, token = self._judge(row, judged[place])
            else:
                end, token = column, self._draft(row, logits)
            ends.append(end)
            newest.append(token)
        going = [place for place, row in enumerate(live) if not row.ended]
        if not going:
            return
        last = max(ends[place] for place in going)
        for place in going:
            if ends[place] < column:
                walk.rewind(place, ends[place], last - ends[place])
                self.tokens.shift(live[place].index, last - ends[place], ends[place])
        self.tokens.ids = self.tokens.ids[:, :last]
        chosen = torch.zeros(len(self.rows), dtype=torch.long)
        for place in going:
            chosen[live[place].index] = newest[place]
        self.tokens.append(chosen.to(self.prompt.device))

    def _judged(self) -> dict[int, Tensor]:
        """Returns the full depth's logits [drafts + 1, vocabulary], by place in the walk, of rows that reached it."""
        found = {}
        for cells, logits in self.walk.checked:
            found |= dict(zip(cells.rows.tolist(), logits.split(cells.widths.tolist()), strict=True))
        return found

    def _due(self, row: Row) -> bool:
        """Returns whether the next token must be the full model's: enough was drafted, or the row would end."""
        left = self.most - len(row.said) - len(row.drafts)
        return row.due or left <= 1 or len(row.drafts) >= row.plan.limit

    def _draft(self, row: Row, logits: Tensor) -> int:
        """Returns the token that an exit says, from logits [batch, vocabulary]; it waits for judgement."""
        own = logits[row.index][None]
        scores = self._processed(row, self.tokens.length, own.clone() if row.processors else own)
        if row.processors and lost(own, scores).item():  # nothing on the exit's shortlist is allowed
            whole = widened(logits, self.walk.listed, np.array([row.index]), self.walk.backbone)
            scores = self._processed(row, self.tokens.length, whole[row.index][None])
        if row.source is None:
            token = int(scores.argmax(-1))
        else:
            row.proposed.append(scores[0].float().softmax(-1))
            token = int(draw(row.proposed[-1][None], [row.source], [0]))
        row.drafts.append(token)
        row.guesses += [scores[0]] if self.keep_scores else []
        row.due = self._ends(row, self.tokens.length, token, row.scores + row.guesses)
        return token

    def _judge(self, row: Row, logits: Tensor) -> tuple[int, int]:
        """Returns how many columns of the row stay, and the token behind them; writes down what is certain now.

        Args:
            logits: [drafts + 1, vocabulary] of the full depth, at every draft's place and behind the last.
        """
        drafts, first = row.drafts, self.tokens.length - len(row.drafts)
        scores = logits
        if row.processors:
            each = logits.clone() if self.keep_logits else logits
            scores = torch.cat([self._processed(row, first + i, each[i : i + 1]) for i in range(len(each))])
        if row.source is None:
            best = scores.argmax(-1).tolist()
            kept = next((i for i, draft in enumerate(drafts) if draft != best[i]), len(drafts))
            token = best[kept]
        else:
            kept, token = judge(scores, drafts, row.proposed, row.source)
        for count, said in enumerate([*drafts[:kept], token]):
            row.said.append(said)
            row.scores += [scores[count]] if self.keep_scores else []
            row.logits += [logits[count]] if self.keep_logits else []
            self.walk.record.columns[row.steps[count]]["accepted"][row.index] = count < kept or kept == len(drafts)
            row.ended = self._ends(row, first + count, said, row.scores)
            if row.ended:
                break
        row.plan.told(count + 1, len(drafts))
        row.drafts, row.proposed, row.guesses, row.steps, row.due = [], [], [], [], False
        return first + kept, token

    def _processed(self, row: Row, length: int, logits: Tensor) -> Tensor:
        """Returns the scores [1, vocabulary] that the processors make of logits behind `length` columns."""
        return row.processors(self.tokens.row(row.index, length), logits) if row.processors else logits

    def _ends(self, row: Row, length: int, token: int, scores: list[Tensor]) -> bool:
        """Returns whether a token behind `length` columns ends the row; `scores` are kept ones, with its own."""
        ids = self.tokens.row(row.index, length)
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1).repeat(self.copies, 1)
        seen = tuple(each.expand(self.copies, -1) for each in scores) if self.keep_scores else None
        return bool(self.criteria(ids, seen)[row.index % self.copies])

    def _stream(self) -> None:
        """Gives the streamer every column that all rows have come past."""
        while self.streamer is not None and (
            any(len(row.said) > self.streamed for row in self.rows)
            and all(row.ended or len(row.said) > self.streamed for row in self.rows)
        ):
            column = [row.said[self.streamed] if len(row.said) > self.streamed else self.pad for row in self.rows]
            self.streamer.put(torch.tensor(column))
            self.streamed += 1

    def _stacked(self, name: str, wanted: bool) -> tuple | None:
        """Returns what rows have kept per token, one [batch, vocabulary] each; 0 in rows that had ended."""
        if not wanted:
            return None
        kept = [getattr(row, name) for row in self.rows]
        none = torch.zeros_like(next(values[0] for values in kept if values))
        return tuple(
            torch.stack([values[i] if i < len(values) else none for values in kept]) for i in range(max(map(len, kept)))
        )


def _foreign(function) -> bool:
    """Returns whether a processor or criterion is not one of transformers' own, whose insides we know."""
    return not type(function).__module__.startswith("transformers.")


def _alone(processors, row: int, batch: int):
    """Returns processors as they would be for one row alone, out of a batch."""
    out = copy.copy(processors)
    for place, processor in enumerate(processors):
        if _foreign(processor):
            out[place] = _among_copies(processor, row, batch) if batch > 1 else processor
            continue
        # What transformers prepares per row is cut to this one.
        out[place] = own = copy.copy(processor)
        for name in ("prompt_ignore_length", "encoder_input_ids"):
            if isinstance(getattr(own, name, None), Tensor):
                setattr(own, name, getattr(own, name)[row : row + 1])
        if hasattr(own, "generated_ngrams"):
            own.generated_ngrams, own.batch_size = own.generated_ngrams[row : row + 1], 1
        if isinstance(own, PrefixConstrainedLogitsProcessor):
            own._prefix_allowed_tokens_fn = partial(_of_row, own._prefix_allowed_tokens_fn, row)
    return out


def _among_copies(processor, row: int, batch: int):
    """Returns a processor of the caller's own for one row. It may hold something for every row of the batch: it gets
    as many copies of this one, and what it makes of the copy in the row's place counts."""
    return lambda ids, scores: processor(ids.repeat(batch, 1), scores.repeat(batch, 1))[row : row + 1]


def _of_row(allowed, row: int, _, ids: Tensor) -> list[int]:
    """Returns the tokens that a `prefix_allowed_tokens_fn` allows behind a row's ids, by its place in the batch."""
    return allowed(row, ids)
