"""One step of decoding: the newest token of every row walks down the chain of segments until a gate lets it out.

What lies beyond the exit is dealt with in one of three ways, and all else is the same:
- `propagate`: skipped blocks get K/V from the state that the token left with (CALM, Schuster et al. 2022, section 3.2);
- `recompute`: the token waits there, and goes on in one batch with the next token of its row that does;
- `verify`: the same, and the full depth's logits of all that waited are kept, to judge what was said early.
Rows that have left, or ended, are taken out of the batch for the deeper segments: a row never depends on its
neighbours, nor pays for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adaptive.backbone import Backbone
from adaptive.exits import Exits, best
from adaptive.kv import KV, select_rows
from adaptive.lanes import GROWTH, BlockLane, Cells, Lane, Tokens, gather
from adaptive.losses import regret
from adaptive.policy import EMPTY, ExitPolicy, Progress, Trace

SHRINK = 0.75  # rows that ended are dropped from the K/V, a copy, once no more than this share is alive


class Walk:
    """Walks the newest token of every live row down the chain of segments, and writes the trace of it.

    Args:
        backbone: the blocks.
        exits: heads and gates.
        depths: of the exits.
        policy: who leaves where.
        tokens: the batch, prompt first; the caller appends.
        kv: what becomes of the blocks beyond an exit: "propagate", "recompute" or "verify".
        probe: ask every gate and head at every token, let nobody leave, and record the regret of each exit's token.

    Attributes:
        members: [members], which rows of the batch the K/V hold.
        checked: what reached the full depth in the last step, if `kv` is "verify": the passes' tokens, and the logits
            [tokens, vocabulary] of each.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits,
        depths: tuple[int, ...],
        policy: ExitPolicy,
        tokens: Tokens,
        kv: str = "propagate",
        probe: bool = False,
    ):
        self.backbone, self.exits, self.depths, self.policy, self.tokens = backbone, exits, depths, policy, tokens
        self.strategy, self.probe, self.device = kv, probe, tokens.ids.device
        self.stops = (*depths, backbone.num_layers)
        self.members = np.arange(len(tokens.ids))
        backbone.refresh()
        self.asked = [probe or policy.asks(index) for index in range(len(depths))]
        self.kv = KV(backbone.num_layers, tokens.length + GROWTH, len(self.members))
        own = exits.config.head_kv == "own"
        self.heads = [
            BlockLane(backbone, head, depth, own, self.kv) if head.kind == "block" and asked else None
            for head, depth, asked in zip(exits.heads, depths, self.asked, strict=True)
        ]
        ahead, waits = np.full(len(self.members), tokens.length), kv != "propagate" and not probe
        self.lanes = [Lane(self.kv, ahead) if asked and waits else None for asked in self.asked]
        self.columns: list[dict[str, np.ndarray]] = []
        self.blocks = np.zeros(len(self.members), np.int64)
        self.checked: list[tuple[Cells, Tensor]] = []

    def prefill(self) -> Tensor:
        """Runs the prompt at full depth; returns logits [batch, vocabulary] of the first new token."""
        tokens = self.tokens
        prompt = Cells(self.members, np.zeros(len(self.members), np.int64), tokens.length - 1)
        hidden, calls = self.backbone.start(*tokens.since(0, self.members), self.kv)
        states, depth = [hidden[:, -1:]], 0
        for index, next_depth in enumerate(self.depths):
            hidden, depth = self.backbone.run(hidden, calls, depth, next_depth), next_depth
            if self.heads[index] is not None and self.heads[index].lane is not None:
                self.heads[index].lane.keep(prompt, hidden)
            states.append(hidden[:, -1:])
        states.append(self.backbone.run(hidden, calls, depth, self.backbone.num_layers)[:, -1:])
        self._begin()
        # A first token that had to be verified would gain nothing by leaving: the full depth has run.
        due = np.full(len(self.members), self.strategy == "verify")
        return self._finish(self._descend(states[0], due, states[1:]), self.members)

    def step(self, live: np.ndarray, due: np.ndarray | None = None) -> Tensor:
        """Runs the newest token of the rows `live`; returns logits [batch, vocabulary], 0 in other rows.

        Args:
            live: rows of the batch; those left out have ended for good.
            due: [live] bool, who goes to the full depth without being asked; None for nobody.
        """
        # Tokens that wait would pile up in a row that has ended, so only `propagate` lets it walk along for a while.
        if len(live) < len(self.members) * (SHRINK if self.strategy == "propagate" else 1):
            self._shrink(np.isin(self.members, live))
        hidden = self._begin()
        return self._finish(self._descend(hidden, np.zeros(len(self.members), bool) if due is None else due), live)

    def rewind(self, row: int, end: int, by: int) -> None:
        """Forgets what followed the first `end` columns of a row of the K/V, and moves those to the right."""
        heads = [head.lane for head in self.heads if head is not None and head.lane is not None]
        for lane in (*self.lanes, *heads):
            if lane is not None:
                lane.rewind(row, end, by)
        if by:
            for cache in (self.kv, *(lane.cache for lane in heads)):
                cache.shift(row, by, end)

    def trace(self) -> Trace:
        """Returns what was done so far, one entry per row and step."""
        stack = {name: np.stack([column[name] for column in self.columns], axis=1) for name in self.columns[0]}
        return Trace(
            exits=self.depths, layers=self.backbone.num_layers, prompt=self.tokens.prompt, kv=self.strategy, **stack
        )

    def _shrink(self, keep: np.ndarray) -> None:
        """Drops rows [members] that have ended from the K/V."""
        self.members, kept = self.members[keep], np.flatnonzero(keep)
        self.kv.select(torch.as_tensor(kept, device=self.device))
        for lane in (*self.lanes, *self.heads):
            if lane is not None:
                lane.select(kept)

    def _begin(self) -> Tensor:
        """Opens a column of the trace and returns the newest tokens' embeddings [members, 1, hidden]."""
        count, size = len(self.depths), len(self.members)
        self.now = {
            "taken": np.full(size, -1, np.int16),
            "scores": np.full((size, count), np.nan, np.float32),
            "context": self.tokens.context[self.members],
            "headed": np.zeros((size, count), bool),
            "caught_up": np.zeros((size, count), np.int32),
            "behind": np.zeros((size, count), np.int32),
        }
        if self.probe:
            self.now["regret"] = np.full((size, count), np.nan, np.float32)
        self.newest, self.narrowed, self.checked = self.tokens.length - 1, {}, []
        self.parts: list[tuple[np.ndarray, Tensor]] = []  # rows that have left, and what they say: logits
        self.unread: list[tuple[Cells, Tensor]] = []  # for the LM head: tokens, normed states
        self.kv.column, self.kv.rows, self.kv.cells = self.newest, None, None
        hidden, self.calls = self.backbone.start(*self.tokens.since(self.newest, self.members), self.kv)
        return hidden

    def _finish(self, logits: Tensor, live: np.ndarray) -> Tensor:
        """Writes the column of the trace, and returns logits [batch, vocabulary] from those of the members."""
        batch, column, alive = len(self.tokens.ids), {}, np.isin(self.members, live)
        self.blocks[self.members] += np.asarray(self.stops)[self.now["taken"]]
        for name, values in self.now.items():
            column[name] = np.full((batch, *values.shape[1:]), EMPTY.get(name, 0), values.dtype)
            column[name][live] = values[alive]
        self.columns.append(column)
        if len(self.members) == batch:
            return logits
        out = logits.new_zeros(batch, logits.shape[1])
        return out.index_copy_(0, torch.as_tensor(self.members, device=self.device), logits)

    def _calls(self, rows: np.ndarray) -> list:
        """Returns the block calls for the newest tokens of these rows and points the K/V at them."""
        self.kv.column, self.kv.cells = self.newest, None
        if len(rows) == len(self.members):
            self.kv.rows = None
            return self.calls
        key = rows.tobytes()
        if key not in self.narrowed:
            index = torch.as_tensor(rows, device=self.device)
            self.narrowed[key] = (index, select_rows(self.calls, len(self.members), index))
        self.kv.rows, calls = self.narrowed[key]
        return calls

    def _run(self, behind: int, target: int, rows: np.ndarray, state: Tensor) -> list[tuple[Cells, Tensor]]:
        """Runs the blocks from exit `behind` (-1: the embedding) to exit `target` on the newest tokens of these rows,
        whose state is given, and on those that wait with them; returns the tokens and states of each pass."""
        first, last = self.stops[behind] if behind >= 0 else 0, self.stops[target]
        lane = self.lanes[behind] if behind >= 0 else None
        if lane is None:
            passes = [self._newest(rows)]
        else:
            self.now["behind"][rows, behind:target] = (self.newest - lane.frontier[rows])[:, None]
            passes = lane.waiting(rows, self.newest)
        done = []
        for cells in passes:
            if len(passes) == 1 and int(cells.widths.max()) == 1:
                calls = self._calls(rows)
            else:
                calls, state = cells.start(self.backbone, self.tokens, self.members, self.kv), cells.take(lane.states)
            done.append((cells, self.backbone.run(state, calls, first, last)))
        return done

    def _descend(self, hidden: Tensor, due: np.ndarray, prefilled: list | None = None) -> Tensor:
        """Returns logits [members, vocabulary]; rows are taken out of the walk as they leave.

        Args:
            hidden: embeddings [members, 1, hidden] of the newest tokens.
            due: [members] bool, who is not asked.
            prefilled: states [members, 1, hidden] at every exit and at full depth, if the blocks have been run already.
        """
        said: dict[int, Tensor] = {}
        rows, state, behind = np.arange(len(self.members)), hidden, -1
        for index in range(len(self.depths)):
            if not self.asked[index]:
                continue
            before = state
            if prefilled is None:
                done, behind = self._run(behind, index, rows, state), index
                state = gather(done, rows)
                self._keep(index, done)
            else:
                state = prefilled[index][torch.as_tensor(rows, device=self.device)]
            leave = self._decide(index, rows, state, before, due[rows], said)
            if leave.any():
                gone = torch.as_tensor(leave, device=self.device)
                if prefilled is None and self.strategy == "propagate":
                    self._fill(index, rows[leave], state[gone])
                rows, state = rows[~leave], state[~gone]
            if not len(rows):
                return self._spoken()
        if prefilled is None:
            done = self._run(behind, len(self.depths), rows, state)
        else:
            done = [(self._newest(rows), prefilled[-1][torch.as_tensor(rows, device=self.device)])]
        self.now["taken"][rows] = len(self.depths)
        logits = self._spoken(done)
        for index, ids in said.items():
            self.now["regret"][rows, index] = regret(logits, ids).cpu().numpy()
        return logits

    def _spoken(self, done: Sequence[tuple[Cells, Tensor]] = ()) -> Tensor:
        """Returns logits [members, vocabulary] of the newest tokens: what the exits have said, and the full depth on
        the passes that got there. Whoever is read by the whole LM head is read in one product: its weights, which many
        blocks weigh up to, are fetched once."""
        for cells, states in done:
            if self.strategy != "verify":  # only a judgement is about the tokens that have waited
                cells, states = self._newest(cells.rows), cells.newest(states)
            self.unread.append((cells, self.backbone.norm(cells.flat(states))))
        parts = self.parts  # rows, and their logits
        if self.unread:
            passes, normed = zip(*self.unread, strict=True)
            logits = self.backbone.logits(normed[0] if len(normed) == 1 else torch.cat(normed)).float()
            read = list(zip(passes, logits.split([len(part) for part in normed]), strict=True))
            parts = parts + [(cells.rows, cells.newest(cells.shaped(each))[:, 0]) for cells, each in read]
            self.checked = read[len(read) - len(done) :] if self.strategy == "verify" else []
        if len(parts) == 1:
            return parts[0][1]
        out = parts[0][1].new_empty(len(self.members), self.backbone.vocab_size)
        for rows, logits in parts:
            out[torch.as_tensor(rows, device=self.device)] = logits
        return out

    def _newest(self, rows: np.ndarray) -> Cells:
        """Returns where the newest tokens of these rows are."""
        return Cells(rows, np.full(len(rows), self.newest), self.newest)

    def _decide(
        self, index: int, rows: np.ndarray, state: Tensor, before: Tensor, due: np.ndarray, said: dict
    ) -> np.ndarray:
        """Asks one gate; returns which rows it lets out, [rows] bool, and keeps what these say."""
        leave = np.zeros(len(rows), bool)
        if due.all():
            return leave
        if due.any():
            asked = torch.as_tensor(~due, device=self.device)
            rows, state, before = rows[~due], state[asked], before[asked]
        gate, early = self.exits.gates[index], self.probe or self.exits.gates[index].reads_logits
        logits, ids = self._read(index, self._head(index, rows, state)) if early else (None, None)
        scores = gate.score(state[:, 0], logits, before[:, 0]).float().cpu().numpy()
        self.now["scores"][rows, index] = scores
        if self.probe:
            said[index] = best(logits, ids)
            return leave
        left = self.policy.leaves(index, scores, self._progress(rows))
        leave[~due] = left
        if left.any():
            gone = torch.as_tensor(left, device=self.device)
            self.now["taken"][rows[left]] = index
            if early:
                logits, ids = logits[gone], ids if ids is None or ids.dim() == 1 else ids[gone]
            else:
                normed = self._head(index, rows[left], state[gone])
                if self.exits.sizes[index] is None:
                    self.unread.append((self._newest(rows[left]), normed))
                    return leave
                logits, ids = self._read(index, normed)
            self.parts.append((rows[left], self._spread(logits.float(), ids)))
        return leave

    def _progress(self, rows: np.ndarray) -> Progress:
        """Returns what has become of these rows so far."""
        members = self.members[rows]
        return Progress(self.stops, self.now["context"][rows] - self.tokens.prompt[members], self.blocks[members])

    def _head(self, index: int, rows: np.ndarray, state: Tensor) -> Tensor:
        """Returns the normed states [rows, hidden] that an exit's head makes of the newest tokens of these rows."""
        head, lane = self.exits.heads[index], self.heads[index]
        self.now["headed"][rows, index] = True
        if lane is None:
            normed = head(state)
        elif lane.lane is None:
            normed = lane.shared_features(state, self._calls(rows))
        else:
            normed, self.now["caught_up"][rows, index] = lane.own_features(rows, self.tokens, self.members)
        return normed[:, 0]

    def _read(self, index: int, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns an exit's logits [rows, entries] for normed states [rows, hidden], and whose they are."""
        return self.exits.logits(self.backbone, index, normed)

    def _spread(self, logits: Tensor, ids: Tensor | None) -> Tensor:
        """Returns logits [rows, vocabulary] from those of a shortlist; what is not on it cannot be said."""
        if ids is None:
            return logits
        full = logits.new_full((len(logits), self.backbone.vocab_size), -torch.inf)
        return full.scatter_(1, ids.expand_as(logits), logits)

    def _keep(self, index: int, done: list[tuple[Cells, Tensor]]) -> None:
        """Keeps states at an exit for those who may wait there, and for a block head with K/V of its own."""
        head = self.heads[index]
        for lane in (self.lanes[index], None if head is None else head.lane):
            if lane is not None:
                for cells, states in done:
                    lane.keep(cells, states)

    def _fill(self, index: int, rows: np.ndarray, state: Tensor) -> None:
        """Fills what lies beyond the exit from the state that the rows left with: K/V and deeper heads' states."""
        depth, last = self.depths[index], self.backbone.num_layers
        self.backbone.fill(state, self._calls(rows), depth, last, self.kv, self.exits.fills[index])
        cells = self._newest(rows)
        for deeper in range(index + 1, len(self.depths)):
            self._keep(deeper, [(cells, state)])
