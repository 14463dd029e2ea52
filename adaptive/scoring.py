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
(CALM, Schuster et al. 2022, section 3.2, all positions at once). Several policies share the context, and every segment
up to the first token on which they decide differently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptive.exits import best
from adaptive.kv import KV, SharedKV, replace_cache
from adaptive.losses import regret
from adaptive.policy import ExitPolicy, Trace
from adaptive.tally import caught_up

FLOOR = 1e-3  # probability that an exit with a shortlist keeps for all the entries which it cannot say
CHUNK = 128  # positions whose logits over the vocabulary are held at once


class Row(NamedTuple):
    """A text to score: `context` is read, `stem` scored, and behind it each alternative of `last`. Token ids."""

    context: Sequence[int]
    stem: Sequence[int]
    last: Sequence[int]


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
        ValueError: an empty context, or no last token.
    """
    if empty := [index for index, row in enumerate(rows) if not len(row.context) or not len(row.last)]:
        raise ValueError(f"rows {empty[:5]} have no context or no last token; give at least one token of each")
    return _Pass(model, rows, policies).run()


@torch.no_grad()
def probe(model, rows: Sequence[Row]) -> Trace:
    """Returns the full depth's trace of these rows with `regret`, what every exit would have said: that which
    `generate(probe=True)` gives, for tokens that are given."""
    one = _Pass(model, rows, [ExitPolicy.full(model.num_exits)], probe=True)
    trace = one.run()[0].trace
    trace.regret = np.where(trace.valid[..., None], one.regret.cpu().numpy(), np.nan)
    return trace


class _Pass:
    """One batch of rows on its way down. Columns are scored positions: 0 is the last of the context, the others lie on
    the stem; contexts are padded on the left and stems on the right, so that both begin in the same column."""

    def __init__(self, model, rows: Sequence[Row], policies: Sequence[ExitPolicy], probe: bool = False):
        self.view, self.exits, self.depths = model.view, model.exits, model.depths
        self.rows, self.policies, self.probe, device = rows, list(policies), probe, model.device
        self.width, self.length = max(len(row.context) for row in rows), max(len(row.stem) for row in rows)
        # Rows of one context, the choices of a question, read it once.
        contexts = list(dict.fromkeys(tuple(row.context) for row in rows))
        self.leaders = [[tuple(row.context) for row in rows].index(context) for context in contexts]
        self.place = torch.tensor([contexts.index(tuple(row.context)) for row in rows], device=device)
        shape = (len(rows), self.width + self.length)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        alternatives = max(len(row.last) for row in rows)
        wanted = torch.full((len(rows), self.length + 1, alternatives), -1)
        for index, row in enumerate(rows):
            inside = slice(self.width - len(row.context), self.width + len(row.stem))
            ids[index, inside], mask[index, inside] = torch.tensor([*row.context, *row.stem]), 1
            wanted[index, : len(row.stem), 0] = torch.tensor(row.stem, dtype=torch.long)
            wanted[index, len(row.stem), : len(row.last)] = torch.tensor(row.last)
        self.ids, self.mask, self.wanted = ids.to(device), mask.to(device), wanted.to(device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        self.valid = (self.wanted >= 0).any(-1)
        # Nothing deeper than this is looked at by anybody.
        self.bottom = 0 if not probe else self.view.num_layers
        for policy in self.policies:
            sure = [depth for depth, threshold in zip(self.depths, policy.thresholds) if threshold == 0]
            self.bottom = max(self.bottom, sure[0] if sure else self.view.num_layers)
        count, size = len(self.depths), self.valid.shape
        self.out = [
            {
                "logprob": torch.zeros(self.wanted.shape, device=device),
                "said": torch.full(size, -1, device=device),
                "unlisted": torch.zeros(size, dtype=torch.long, device=device),
                "taken": torch.full(size, -1, dtype=torch.int16, device=device),
                "scores": torch.full((*size, count), torch.nan, device=device),
                "headed": torch.zeros((*size, count), dtype=torch.bool, device=device),
            }
            for _ in self.policies
        ]
        self.regret = torch.full((*size, count), torch.nan, device=device) if probe else None
        self.told: dict[int, Tensor] = {}
        own = self.exits.config.head_kv == "own"
        self.owning = np.array([own and head.kind == "block" for head in self.exits.heads])

    def run(self) -> list[Scored]:
        """Returns what each policy says."""
        self.kv = KV(self.view.num_layers, self.width + self.length, len(self.leaders))
        self.asked = [self.probe or any(policy.asks(i) for policy in self.policies) for i in range(len(self.depths))]
        self._prefill()
        stem, self.calls = self.embedded, None
        if self.length:
            self.kv.column = self.width
            stem, self.calls = self.view.start(
                self.ids[:, self.width :], self.mask, self.positions[:, self.width :], self.kv
            )
        gone = ~self.valid
        state = torch.cat([self.embedded, stem], dim=1) if self.length else self.embedded
        self._descend(0, 0, state, state, gone, list(range(len(self.policies))))
        return [self._result(out) for out in self.out]

    def _prefill(self) -> None:
        """Runs the context; keeps the state of its last position at every depth that is asked."""
        hidden, calls = self.view.start(
            *(each[self.leaders, : self.width] for each in (self.ids, self.mask, self.positions)), self.kv
        )
        self.embedded, self.first, self.read, self.lanes, depth = hidden[self.place, -1:], [], [], [], 0
        for index, exit_depth in enumerate(self.depths):
            if exit_depth > self.bottom:
                break
            hidden, depth = self.view.run(hidden, calls, depth, exit_depth), exit_depth
            self.first.append(hidden[self.place, -1:])
            self.lanes.append(None)
            self.read.append(None)
            head = self.exits.heads[index]
            if head.kind == "block" and self.asked[index]:
                shared = SharedKV(self.kv, self.view.num_layers - exit_depth)
                own = KV(self.view.num_layers, self.kv.capacity, len(self.leaders))
                self.lanes[index] = own if self.owning[index] else shared
                replaced = [replace_cache(call, self.kv, self.lanes[index]) for call in calls]
                self.read[index] = head(hidden, replaced)[self.place, -1:]
        if self.bottom == self.view.num_layers:
            self.first.append(self.view.run(hidden, calls, depth, self.bottom)[self.place, -1:])
        if self.length and len(self.leaders) < len(self.rows):
            for cache in (self.kv, *(lane for lane in self.lanes if isinstance(lane, KV))):
                _spread(cache, self.place)

    def _run(self, state: Tensor, first: int, last: int, gone: Tensor, index: int) -> Tensor:
        """Returns the state [rows, columns, hidden] at depth `last`, that of exit `index`; who has left keeps his."""
        if not self.length:
            return torch.where(gone[..., None], state, self.first[index])
        stem, left = state[:, 1:], gone[:, 1:]
        still = left.any()
        for block in range(first, last):
            out = self.view.run(stem, self.calls, block, block + 1)
            stem = torch.where(left[..., None], stem, out) if still else out
        return torch.cat([self.first[index], stem], dim=1)

    def _descend(self, index: int, depth: int, state: Tensor, before: Tensor, gone: Tensor, who: list[int]) -> None:
        """Takes the policies `who`, which have agreed on everything so far, to exit `index` and on from there."""
        if index == len(self.depths):
            state = self._run(state, depth, self.view.num_layers, gone, index)
            self._read(index, self.view.norm(state[~gone]), ~gone, {number: ~gone for number in who})
            return
        state = self._run(state, depth, self.depths[index], gone, index)
        asking = [number for number in who if self.probe or self.policies[number].asks(index)]
        leaves = {number: torch.zeros_like(gone) for number in who}
        if asking:
            leaves |= self._ask(index, state, before, gone, asking)
        groups: dict[tuple, list[int]] = {}
        for number in who:
            # A gate that compares with the exit asked before must know which one that was.
            told = number in asking and self.exits.gates[index].kind == "similarity"
            groups.setdefault((told, leaves[number].cpu().numpy().tobytes()), []).append(number)
        for members in groups.values():
            here = gone | leaves[members[0]]
            if not here.all():
                last = state if members[0] in asking else before
                self._descend(index + 1, self.depths[index], state, last, here, members)

    def _ask(self, index: int, state: Tensor, before: Tensor, gone: Tensor, asking: list[int]) -> dict[int, Tensor]:
        """Asks one gate and reads the head where anybody leaves; returns who leaves [rows, columns] by policy."""
        gate, here = self.exits.gates[index], ~gone
        early = gate.reads_logits or self.probe
        normed = self._features(index, state, here) if early else None
        scores = state.new_full(gone.shape, torch.nan, dtype=torch.float32)
        if early:
            parts = zip(normed.split(CHUNK), state[here].split(CHUNK), before[here].split(CHUNK))
            scores[here] = torch.cat([gate.score(s, self._logits(index, n)[0], b).float() for n, s, b in parts])
        else:
            scores[here] = gate.score(state[here], None, before[here]).float()
        leaves = {}
        for number in asking:
            out = self.out[number]
            out["scores"][..., index][here] = scores[here]
            leaves[number] = here & (False if self.probe else self.policies[number].leaves(index, scores))
            out["headed"][..., index] |= here if early else leaves[number]
        if self.probe:
            said = torch.cat([best(*self._logits(index, part)) for part in normed.split(CHUNK)])
            self.told[index] = said.new_zeros(gone.shape).masked_scatter_(here, said)
            return leaves
        anybody = torch.stack(list(leaves.values())).any(0)
        if anybody.any():
            normed = normed[anybody[here]] if early else self._features(index, state, anybody)
            self._read(index, normed, anybody, leaves)
        return leaves

    def _features(self, index: int, state: Tensor, where: Tensor) -> Tensor:
        """Returns an exit's normed states [N, hidden] at the positions `where` [rows, columns]."""
        head = self.exits.heads[index]
        if head.kind != "block":
            return head(state[where])
        normed = self.read[index]
        if self.length:
            lane = self.lanes[index]
            if isinstance(lane, KV):
                lane.column = self.width
            calls = [replace_cache(call, self.kv, lane) for call in self.calls]
            normed = torch.cat([normed, head(state[:, 1:], calls)], dim=1)
        return normed[where]

    def _logits(self, index: int, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns logits [N, entries] of an exit (or the full depth) and their vocabulary entries, None for all."""
        if index == len(self.depths):
            return self.view.logits(normed), None
        return self.exits.logits(self.view, index, normed)

    def _read(self, index: int, normed: Tensor, where: Tensor, leaves: dict[int, Tensor]) -> None:
        """Writes down what exit `index` says at the positions `where`, for the policies that leave there.

        Args:
            normed: normed states [N, hidden] of those positions.
            where: [rows, columns].
            leaves: by policy, [rows, columns] within `where`.
        """
        wanted, found = self.wanted[where], []
        for part, target in zip(normed.split(CHUNK), wanted.split(CHUNK)):
            logits, ids = self._logits(index, part)
            found.append((*log_probabilities(logits, ids, target, self.view.vocab_size), best(logits, ids)))
            if self.probe:
                rows = slice((len(found) - 1) * CHUNK, (len(found) - 1) * CHUNK + len(part))
                for exit, told in self.told.items():
                    column = self.regret[..., exit]
                    some = where.nonzero()[rows].unbind(-1)
                    column[some] = regret(logits, told[some])
        logprob, unlisted, said = (torch.cat(parts) for parts in zip(*found))
        for number, leave in leaves.items():
            out, mine = self.out[number], leave[where]
            out["logprob"][leave], out["unlisted"][leave] = logprob[mine], unlisted[mine]
            out["said"][leave], out["taken"][leave] = said[mine], index

    def _result(self, out: dict[str, Tensor]) -> Scored:
        got = {name: values.cpu().numpy() for name, values in out.items()}
        logprob, lengths = got["logprob"].astype(np.float64), [len(row.stem) for row in self.rows]
        prompt = np.array([len(row.context) for row in self.rows])
        trace = Trace(
            exits=self.depths,
            layers=self.view.num_layers,
            taken=got["taken"],
            scores=got["scores"],
            context=prompt[:, None] + np.arange(self.length + 1),
            headed=got["headed"],
            caught_up=caught_up(got["headed"] & self.owning, prompt),
            prompt=prompt,
        )
        last = [logprob[i, n, : len(row.last)] for i, (n, row) in enumerate(zip(lengths, self.rows))]
        stem = np.array([logprob[i, :n, 0].sum() for i, n in enumerate(lengths)])
        return Scored(stem, last, got["said"], got["unlisted"], trace)


def _spread(cache: KV, place: Tensor) -> None:
    """Gives every row the K/V of its context; blocks that were not run have none."""
    cache.batch = len(place)
    cache.keys = [None if keys is None else keys[place] for keys in cache.keys]
    cache.values = [None if values is None else values[place] for values in cache.values]


def log_probabilities(logits: Tensor, ids: Tensor | None, wanted: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities [N, A] in nats of the entries `wanted`, and how many [N] of them cannot be said.

    Args:
        logits: [N, entries].
        ids: vocabulary entry of each column, [entries] or [N, entries]; None for the whole vocabulary.
        wanted: [N, A] vocabulary entries; -1 where there is none, which gives 0.
        vocab: size of the vocabulary.
    """
    logits, real = logits.float(), wanted >= 0
    norm = logits.logsumexp(-1, keepdim=True)
    if ids is None:
        return torch.where(real, logits.gather(-1, wanted.clamp_min(0)) - norm, 0.0), real.new_zeros(len(real)).long()
    hits = ids.expand(len(logits), -1)[:, None] == wanted[..., None]
    found = hits.any(-1)
    listed = logits.gather(-1, hits.int().argmax(-1)) - norm + math.log1p(-FLOOR)
    rest = math.log(FLOOR / max(vocab - ids.shape[-1], 1))
    out = torch.where(found, listed, torch.full_like(listed, rest))
    return torch.where(real, out, 0.0), (real & ~found).sum(-1)
