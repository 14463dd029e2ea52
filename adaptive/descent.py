"""One batch of texts on its way down the chain of segments, all tokens at once, under several policies at once.

What the result means stands in `scoring.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptive.exits import best
from adaptive.kv import KV, SharedKV, replace_cache, select_rows
from adaptive.losses import regret
from adaptive.policy import ExitPolicy, Progress

FLOOR = 1e-3  # probability that an exit with a shortlist keeps for all the entries which it cannot say
CHUNK = 128  # positions whose logits over the vocabulary are held at once


class Row(NamedTuple):
    """A text to score: `context` is read, `stem` scored, and behind it each alternative of `last`. Token ids."""

    context: Sequence[int]
    stem: Sequence[int]
    last: Sequence[int]


class Descent:
    """One batch of rows on its way down. Columns are scored positions: 0 is the last of the context, the others lie on
    the stem; contexts are padded on the left and stems on the right, so that both begin in the same column.

    What walks are lanes: a row as those policies see it that have let the same tokens of it out so far. `self.row`
    [lanes] has the row of each, `self.who` [policies, rows] the lane of a policy's row, -1 once all of it has left.
    """

    def __init__(self, model, rows: Sequence[Row], policies: Sequence[ExitPolicy], probe: bool = False):
        self.view, self.exits, self.depths = model.view, model.exits, model.depths
        self.view.refresh()
        self.rows, self.policies, self.probe, device = rows, list(policies), probe, model.device
        self.width, self.length = max(len(row.context) for row in rows), max(len(row.stem) for row in rows)
        # Rows of one context, the choices of a question, read it once.
        contexts = [tuple(row.context) for row in rows]
        different = list(dict.fromkeys(contexts))
        self.leaders = [contexts.index(context) for context in different]
        self.place = torch.tensor([different.index(context) for context in contexts], device=device)
        shape = (len(rows), self.width + self.length)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        wanted = torch.full((len(rows), self.length + 1, max(len(row.last) for row in rows)), -1)
        for index, row in enumerate(rows):
            inside = slice(self.width - len(row.context), self.width + len(row.stem))
            ids[index, inside], mask[index, inside] = torch.tensor([*row.context, *row.stem]), 1
            wanted[index, : len(row.stem), 0] = torch.tensor(row.stem, dtype=torch.long)
            wanted[index, len(row.stem), : len(row.last)] = torch.tensor(row.last)
        self.ids, self.mask, self.wanted = ids.to(device), mask.to(device), wanted.to(device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        valid = (self.wanted >= 0).any(-1)
        self.gone, self.row = ~valid, torch.arange(len(rows), device=device)
        self.at = torch.full(valid.shape, -1, device=device)  # [lanes, columns], the exit that a token left at
        self.who = self.row.repeat(len(self.policies), 1)
        # Nothing deeper than this is looked at by anybody.
        self.bottom = 0 if not probe else self.view.num_layers
        for policy in self.policies:
            plain = type(policy) is ExitPolicy  # thresholds of others change on the way
            sure = [depth for depth, threshold in zip(self.depths, policy.thresholds) if threshold == 0 and plain]
            self.bottom = max(self.bottom, sure[0] if sure else self.view.num_layers)
        count, size = len(self.depths), valid.shape
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

    def run(self) -> None:
        """Fills `out`, per policy what was said [rows, columns, ...], and `regret` if probed."""
        self.kv = KV(self.view.num_layers, self.width + self.length, len(self.leaders))
        self.asked = [self.probe or any(policy.asks(i) for policy in self.policies) for i in range(len(self.depths))]
        self._prefill()
        self.state, self.all_calls = self.embedded, None
        if self.length:
            self.kv.column = self.width
            stem = slice(self.width, None)
            hidden, self.all_calls = self.view.start(self.ids[:, stem], self.mask, self.positions[:, stem], self.kv)
            self.state = torch.cat([self.embedded, hidden], dim=1)
        self.before, self.calls, depth = self.state, self.all_calls, 0
        for index, exit_depth in enumerate(self.depths):
            if len(self.row):
                self._run(depth, exit_depth, index)
                self._regroup(index, self._ask(index) if self.asked[index] else {})
                depth = exit_depth
        if len(self.row):
            self._run(depth, self.view.num_layers, len(self.depths))
            here = ~self.gone
            normed = self.view.norm(self.state[here])
            self._read(len(self.depths), normed, here, {number: None for number in range(len(self.policies))})

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

    def _run(self, first: int, last: int, index: int) -> None:
        """Takes the lanes' states [lanes, columns, hidden] to depth `last`, of exit `index`; who left keeps his."""
        if not self.length:
            self.state = torch.where(self.gone[..., None], self.state, self.first[index][self.row])
            return
        _spread(self.kv, self.place[self.row], range(first, last))
        stem, left = self.state[:, 1:], self.gone[:, 1:]
        still = left.any()
        if still and first < last and self.view.packs:
            self._fill(stem, first, last)
        for block in range(first, last):
            out = self.view.run(stem, self.calls, block, block + 1)
            stem = torch.where(left[..., None], stem, out) if still else out
        self.kv.given = {}
        self.state = torch.cat([self.first[index][self.row], stem], dim=1)

    def _fill(self, stem: Tensor, first: int, last: int) -> None:
        """Sees to it that blocks first..last-1 take the K/V of who has left from the fill of the exit he left at."""
        at = self.at[:, 1:]
        for exit, fill in enumerate(self.exits.fills):
            which = at == exit
            if fill is not None and which.any():
                keys, values = self.view.projections.project(stem, self.calls, first, last, fill)
                for block, *given in zip(range(first, last), keys, values):
                    self.kv.given.setdefault(block, []).append((which[:, None, :, None], *given))

    def _ask(self, index: int) -> dict[int, Tensor]:
        """Asks one gate and reads the head where anybody leaves; returns by policy who leaves, [lanes, columns]."""
        asking = [number for number, policy in enumerate(self.policies) if self.probe or policy.asks(index)]
        here = torch.zeros_like(self.gone)
        here[self.who[asking][self.who[asking] >= 0]] = True
        here &= ~self.gone
        gate = self.exits.gates[index]
        early = gate.reads_logits or self.probe
        normed = self._features(index, here) if early else None
        scores = self.state.new_full(here.shape, torch.nan, dtype=torch.float32)
        if early:
            parts = zip(normed.split(CHUNK), self.state[here].split(CHUNK), self.before[here].split(CHUNK))
            scores[here] = torch.cat([gate.score(s, self._logits(index, n)[0], b).float() for n, s, b in parts])
        else:
            scores[here] = gate.score(self.state[here], None, self.before[here]).float()
        leaves = {}
        for number in asking:
            rows, lanes = self._mine(number)
            leaves[number] = torch.zeros_like(here)
            if not self.probe:
                leaves[number][lanes] = here[lanes] & self._let_out(number, index, scores[lanes])
            self.out[number]["scores"][rows, :, index] = torch.where(here[lanes], scores[lanes], torch.nan)
            self.out[number]["headed"][rows, :, index] = (here if early else leaves[number])[lanes]
        if self.probe:
            said = torch.cat([best(*self._logits(index, part)) for part in normed.split(CHUNK)])
            self.told[index] = said.new_zeros(here.shape).masked_scatter_(here, said)
            return leaves
        anybody = torch.stack(list(leaves.values())).any(0)
        if anybody.any():
            normed = normed[anybody[here]] if early else self._features(index, anybody)
            self._read(index, normed, anybody, leaves)
        return leaves

    def _let_out(self, number: int, index: int, scores: Tensor) -> Tensor:
        """Returns whom a policy lets out at an exit by the scores [rows, columns], bool."""
        policy = self.policies[number]
        if type(policy) is ExitPolicy:
            return policy.leaves(index, scores)
        tokens = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        # What a row has spent is not known while all its tokens walk together; `score` refuses policies that ask.
        progress = Progress((*self.depths, self.view.num_layers), tokens, np.zeros(scores.shape))
        return torch.as_tensor(policy.leaves(index, scores.cpu().numpy(), progress), device=scores.device)

    def _mine(self, number: int) -> tuple[Tensor, Tensor]:
        """Returns the rows of which a policy still has tokens, and their lanes."""
        rows = (self.who[number] >= 0).nonzero()[:, 0]
        return rows, self.who[number, rows]

    def _regroup(self, index: int, leaves: dict[int, Tensor]) -> None:
        """Parts the lanes whose policies have let different tokens out; drops those that everybody has left."""
        found: dict[tuple, int] = {}
        masks = []
        for number in range(len(self.policies)):
            for row, lane in zip(*(each.tolist() for each in self._mine(number))):
                gone = self.gone[lane] | leaves[number][lane] if number in leaves else self.gone[lane]
                if gone.all():
                    self.who[number, row] = -1
                    continue
                key = (lane, gone.cpu().numpy().tobytes())
                if key not in found:
                    found[key] = len(found)
                    masks.append(gone)
                self.who[number, row] = found[key]
        parents = torch.tensor([lane for lane, *_ in found], dtype=torch.long, device=self.row.device)
        if not len(parents):
            self.row = parents
            return
        gone, at = torch.stack(masks), self.at[parents]
        self.at = torch.where(gone & ~self.gone[parents], index, at)
        self.state, self.row, self.gone = self.state[parents], self.row[parents], gone
        self.before = self.state
        if self.length:
            self.calls = select_rows(self.all_calls, len(self.rows), self.row)
            if self.exits.shares_kv:  # a deeper head may read K/V of blocks that have been run already
                _spread(self.kv, parents, range(self.depths[index]))

    def _features(self, index: int, where: Tensor) -> Tensor:
        """Returns an exit's normed states [N, hidden] at the positions `where` [lanes, columns]."""
        head = self.exits.heads[index]
        if head.kind != "block":
            return head(self.state[where])
        normed = self.read[index][self.row]
        if self.length:
            cache = self.lanes[index]
            if self.owning[index]:
                cache = copy.copy(cache)
                cache.keys, cache.values, cache.column = list(cache.keys), list(cache.values), self.width
                _spread(cache, self.place[self.row], head.sources)
            calls = [replace_cache(call, self.kv, cache) for call in self.calls]
            normed = torch.cat([normed, head(self.state[:, 1:], calls)], dim=1)
        return normed[where]

    def _logits(self, index: int, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns logits [N, entries] of an exit (or the full depth) and their vocabulary entries, None for all."""
        if index == len(self.depths):
            return self.view.logits(normed), None
        return self.exits.logits(self.view, index, normed)

    def _read(self, index: int, normed: Tensor, where: Tensor, leaves: dict[int, Tensor | None]) -> None:
        """Writes down what exit `index` says at the positions `where`, for the policies that leave there.

        Args:
            normed: normed states [N, hidden] of those positions.
            where: [lanes, columns].
            leaves: by policy, [lanes, columns] within `where`; None for all of them.
        """
        found, places = [], where.nonzero()
        for part, some in zip(normed.split(CHUNK), places.split(CHUNK)):
            logits, ids = self._logits(index, part)
            wanted = self.wanted[self.row[some[:, 0]], some[:, 1]]
            found.append((*log_probabilities(logits, ids, wanted, self.view.vocab_size), best(logits, ids)))
            for exit, told in self.told.items():
                self.regret[..., exit][some.unbind(-1)] = regret(logits, told[some.unbind(-1)])
        logprob, unlisted, said = (torch.cat(parts) for parts in zip(*found))
        spread = {
            "logprob": logprob.new_zeros(*where.shape, logprob.shape[1]),
            "unlisted": unlisted.new_zeros(where.shape),
            "said": said.new_zeros(where.shape),
        }
        for name, values in (("logprob", logprob), ("unlisted", unlisted), ("said", said)):
            spread[name][where] = values
        for number, leave in leaves.items():
            rows, lanes = self._mine(number)
            mine = (where if leave is None else leave)[lanes]
            for name, values in spread.items():
                kept = self.out[number][name]
                kept[rows] = torch.where(mine[..., None] if values.dim() == 3 else mine, values[lanes], kept[rows])
            kept = self.out[number]["taken"]
            kept[rows] = torch.where(mine, index, kept[rows].long()).to(kept.dtype)


def _spread(cache: KV, place: Tensor, layers: Sequence[int]) -> None:
    """Gives these layers of a cache a row for each of `place`, with the K/V of that row as it was."""
    cache.batch = len(place)
    for layer in layers:
        if cache.keys[layer] is not None:
            cache.keys[layer], cache.values[layer] = cache.keys[layer][place], cache.values[layer][place]


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
