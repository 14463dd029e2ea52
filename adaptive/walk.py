"""One step of decoding: the newest token of every row walks down the chain of segments until a gate lets it out.

What lies beyond the exit is dealt with in one of three ways, and all else is the same:
- `propagate`: skipped blocks get K/V from the state that the token left with (CALM, Schuster et al. 2022, section 3.2);
- `recompute`: the token goes on all the same, in one batch with what goes deeper next: another row's token of the same
  step or, for which it waits, the next one of its own row;
- `verify`: it waits for the next one of its row, and the full depth's logits of all that waited judge what was said.
What a row says never depends on its neighbours. Rows that ended, and under the others than `recompute` those that left,
are taken out of the batch for the deeper segments. Under `propagate`, rows whose tokens and K/V are the same so far are
one row of the K/V: a prompt under several policies, or sampled several times, is copied where its rows part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from adaptive.backbone import Backbone
from adaptive.exits import Exits, best, spread
from adaptive.kv import KV, select_rows
from adaptive.lanes import GROWTH, BlockLane, Cells, Lane, Tokens, at, gather
from adaptive.losses import regret
from adaptive.members import Members, Policies
from adaptive.policy import ExitPolicy
from adaptive.record import Record

SHRINK = 0.75  # rows that ended are dropped from the K/V, a copy, once no more than this share is alive


class Walk:
    """Walks the newest token of every live row down the chain of segments, and writes the trace of it.

    Args:
        backbone: the blocks.
        exits: heads and gates.
        depths: of the exits.
        policy: who leaves where; one for all rows of the batch, or one for each.
        tokens: the batch, prompt first; the caller appends.
        kv: what becomes of the blocks beyond an exit: "propagate", "recompute" or "verify".
        probe: ask every gate and head at every token, let nobody leave, and record the regret of each exit's token.

    Attributes:
        members: which rows of the batch the K/V hold.
        record: the trace so far.
        checked: passes at full depth in the last step, if `kv` is "verify": tokens, and logits [tokens, vocabulary].
        listed: rows of the batch that left in the last step with a shortlist, and their normed states [rows, hidden].
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits,
        depths: tuple[int, ...],
        policy: ExitPolicy | Sequence[ExitPolicy],
        tokens: Tokens,
        kv: str = "propagate",
        probe: bool = False,
    ):
        self.backbone, self.exits, self.depths, self.tokens = backbone, exits, depths, tokens
        self.strategy, self.probe, self.device = kv, probe, tokens.ids.device
        self.stops = (*depths, backbone.num_layers)
        self.members = Members(tokens, share=kv == "propagate" and not probe)
        backbone.refresh()
        self.run = backbone.runner()
        self.policies = Policies(policy, len(tokens.ids))
        self.asks = np.array([probe | self.policies.asks(index) for index in range(len(depths))])  # [exits, batch]
        self.asked = self.asks.any(axis=1).tolist()
        self.record = Record(depths, backbone.num_layers, tokens, probe)
        self.kv = KV(backbone.num_layers, tokens.length + GROWTH, len(self.members))
        own = exits.config.head_kv == "own"
        self.heads = [
            BlockLane(backbone, head, depth, own, self.kv) if head.kind == "block" and asked else None
            for head, depth, asked in zip(exits.heads, depths, self.asked, strict=True)
        ]
        ahead, waits = np.full(len(self.members), tokens.length), kv != "propagate" and not probe
        self.lanes = [Lane(self.kv, ahead) if asked and waits else None for asked in self.asked]
        self.checked: list[tuple[Cells, Tensor]] = []

    def prefill(self) -> Tensor:
        """Runs the prompt at full depth; returns logits [batch, vocabulary] of the first new token."""
        tokens, members = self.tokens, np.arange(len(self.members))
        prompt = Cells(members, np.zeros(len(members), np.int64), tokens.length - 1)
        hidden, calls = self.backbone.start(*tokens.since(0, self.members.lead), self.kv)
        states, depth = [hidden[:, -1:]], 0
        for index, next_depth in enumerate(self.depths):
            hidden, depth = self.backbone.run(hidden, calls, depth, next_depth), next_depth
            if self.heads[index] is not None and self.heads[index].lane is not None:
                self.heads[index].lane.keep(prompt, hidden)
            states.append(hidden[:, -1:])
        states.append(self.backbone.run(hidden, calls, depth, self.backbone.num_layers)[:, -1:])
        self._begin()
        # A first token that had to be verified would gain nothing by leaving: the full depth has run.
        due = np.full(len(self.members), self.strategy == "verify" and not self.probe)
        logits = self._descend(states[0], due, states)
        self.record.close(np.arange(len(tokens.ids)))
        return logits

    def step(self, live: np.ndarray, due: np.ndarray | None = None) -> Tensor:
        """Runs the newest token of the rows `live`; returns logits [batch, vocabulary], 0 in other rows.

        Args:
            live: rows of the batch; those left out have ended for good.
            due: [live] bool, who goes to the full depth without being asked; None for nobody.
        """
        self._part(live)
        # Tokens that wait would pile up in a row that has ended, so only `propagate` lets it walk along for a while.
        alive = np.isin(np.arange(len(self.members)), self.members.home[live])
        if alive.sum() < len(alive) * (SHRINK if self.strategy == "propagate" else 1):
            self._shrink(np.flatnonzero(alive))
        logits = self._descend(self._begin(), np.zeros(len(self.members), bool) if due is None else due)
        self.record.close(live)
        return logits

    def rewind(self, row: int, end: int, by: int) -> None:
        """Forgets what followed the first `end` columns of a row of the K/V, and moves those to the right."""
        heads = [head.lane for head in self.heads if head is not None and head.lane is not None]
        self.record.rewind(self.members.lead[row], end, by)
        for lane in (*self.lanes, *heads):
            if lane is not None:
                lane.rewind(row, end, by)
        if by:
            for cache in (self.kv, *(lane.cache for lane in heads)):
                cache.shift(row, by, end)

    def _shrink(self, kept: np.ndarray) -> None:
        """Keeps only these rows of the K/V; the others' have ended."""
        self.members.select(kept)
        self.kv.select(torch.as_tensor(kept, device=self.device), self.newest + 1)
        for lane in (*self.lanes, *self.heads):
            if lane is not None:
                lane.select(kept)

    def _part(self, live: np.ndarray) -> None:
        """Gives rows of the batch that have said different tokens K/V of their own."""
        self.members.settle(live)
        if len(live) > len(np.unique(self.members.home[live])):
            said, homes = self.tokens.ids[:, -1].cpu().numpy(), self.members.home[live]
            parted = said[live] != said[self.members.lead[homes]]
            if parted.any():
                self._split(live[parted], homes[parted] * self.backbone.vocab_size + said[live[parted]])

    def _split(self, who: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Moves rows of the batch to copies of their K/V, one for each label, behind the others; returns which row each
        row of the K/V, copy or not, was before."""
        before, sources = len(self.members), self.members.split(who, labels)
        self.kv.repeat(torch.as_tensor(sources, device=self.device), self.newest + 1)
        for head in self.heads:
            if head is not None:
                head.repeat(sources)
        return np.concatenate([np.arange(before), sources])

    def _begin(self) -> Tensor:
        """Opens a column of the trace and returns the newest tokens' embeddings [members, 1, hidden]."""
        self.now, self.newest, self.narrowed, self.checked = self.record.open(), self.tokens.length - 1, {}, []
        self.parts: list[tuple[np.ndarray, Tensor]] = []  # rows of the batch that have left, and what they say: logits
        self.listed: list[tuple[np.ndarray, Tensor]] = []  # of these, who has a shortlist; the head's normed states
        self.unread: list[tuple] = []  # for the LM head: tokens, normed states; rows of the batch, whose these are
        self.kv.column, self.kv.rows, self.kv.cells = self.newest, None, None
        hidden, self.calls = self.backbone.start(*self.tokens.since(self.newest, self.members.lead), self.kv)
        return hidden

    def _riders(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of the batch on these rows of the K/V that no exit has let out yet, and whose they are."""
        return self.members.riders(rows, self.now["taken"] < 0)

    def _calls(self, rows: np.ndarray) -> list:
        """Returns the block calls for the newest tokens of these rows and points the K/V at them."""
        self.kv.column, self.kv.rows, self.kv.cells = self.newest, None, None
        if len(rows) == len(self.members):
            return self.calls
        key = rows.tobytes()
        if key not in self.narrowed:
            index = torch.as_tensor(rows, device=self.device)
            self.narrowed[key] = (index, select_rows(self.calls, len(self.members), index))
        self.kv.rows, calls = self.narrowed[key]
        return calls

    def _run(self, behind: int, target: int, rows: np.ndarray, state: Tensor) -> tuple[list, Tensor]:
        """Runs the blocks from exit `behind` (-1: the embedding) to exit `target` on the newest tokens of these rows,
        whose state is given, and on those that wait with them; returns the tokens and states of each pass, and what
        these rows' states [rows, 1, hidden] are at the exit right before `target`, asked or not."""
        first, lane = (self.stops[behind], self.lanes[behind]) if behind >= 0 else (0, None)
        middle = self.stops[target - 1] if target else 0
        if lane is None:
            passes = [self._newest(rows)]
        else:
            who = self.members.lead[rows]  # nobody shares K/V where tokens wait
            ran = self.newest - lane.frontier[rows, None] + (self.now["taken"][who, None] >= 0)
            self.now["behind"][who, behind:target] = ran
            passes = lane.waiting(rows, self.newest)
        done, before = [], []
        for cells in passes:
            if len(passes) == 1 and int(cells.widths.max()) == 1:
                calls = self._calls(rows)
            else:
                calls = cells.start(self.backbone, self.tokens, self.members.lead, self.kv)
                state = cells.take(lane.states)
            before.append((cells, self.run(state, calls, first, middle)))
            done.append((cells, self.run(before[-1][1], calls, middle, self.stops[target])))
        return done, gather(before, rows)

    def _descend(self, hidden: Tensor, due: np.ndarray, prefilled: list | None = None) -> Tensor:
        """Returns logits [batch, vocabulary]; rows are taken out of the walk as they leave.

        Args:
            hidden: embeddings [members, 1, hidden] of the newest tokens.
            due: [members] bool, who is not asked.
            prefilled: states [members, 1, hidden] at depth 0, all exits and full depth, if the blocks have been run.
        """
        rows, state, behind, said = np.arange(len(self.members)), hidden, -1, {}
        for index in range(len(self.depths)):
            if not self.asked[index]:
                continue
            if prefilled is None:
                done, before = self._run(behind, index, rows, state)
                state, behind = gather(done, rows), index
                self._keep(index, done)
            else:
                before, state = (at(states, rows) for states in prefilled[index : index + 2])
            who, places = self._decide(index, rows, state, before, due[rows], said)
            if len(who):
                stays = np.zeros(len(rows), bool)
                stays[self._riders(rows)[1]] = True
                if prefilled is None and self.strategy == "propagate" and self.depths[index] < self.backbone.num_layers:
                    self._fill(index, rows, state, who, places, stays)
                # Whoever has left runs along where somebody goes on: alone, later, he would cost more than now.
                stays |= self.strategy == "recompute" and stays.any()
                rows, state = rows[stays], at(state, np.flatnonzero(stays))
            if not len(rows):
                return self._spoken()
        full = prefilled and [(self._newest(rows), at(prefilled[-1], rows))]
        logits = self._spoken(full or self._run(behind, len(self.depths), rows, state)[0])
        for index, (who, ids) in said.items():
            self.now["regret"][who, index] = regret(at(logits, who), ids).cpu().numpy()
        return logits

    def _spoken(self, done: Sequence[tuple[Cells, Tensor]] = ()) -> Tensor:
        """Returns logits [batch, vocabulary] of the newest tokens: what the exits have said, and the full depth on the
        passes that got there; 0 of rows that have ended. Whoever is read by the whole LM head is read in one product:
        its weights, which many blocks weigh up to, are fetched once."""
        for cells, states in done:
            who, places = self._riders(cells.rows)
            if self.strategy != "verify":  # only a judgement is about the tokens that have waited
                read, places = np.unique(places, return_inverse=True)
                cells, states = self._newest(cells.rows[read]), at(cells.newest(states), read)
            self.now["taken"][who] = len(self.depths)
            self.unread.append((cells, self.backbone.norm(cells.flat(states)), who, places))
        parts = self.parts
        if self.unread:
            passes, normed, *riders = zip(*self.unread, strict=True)
            logits = self.backbone.logits(normed[0] if len(normed) == 1 else torch.cat(normed)).float()
            read = list(zip(passes, logits.split([len(part) for part in normed]), strict=True))
            newest = [cells.newest(cells.shaped(each))[:, 0] for cells, each in read]
            parts = parts + [(who, at(each, places)) for each, who, places in zip(newest, *riders, strict=True)]
            self.checked = read[len(read) - len(done) :] if self.strategy == "verify" else []
        if len(parts) == 1 and len(parts[0][0]) == len(self.tokens.ids):
            return parts[0][1]
        out = parts[0][1].new_zeros(len(self.tokens.ids), self.backbone.vocab_size)
        for who, logits in parts:
            out[torch.as_tensor(who, device=self.device)] = logits
        return out

    def _newest(self, rows: np.ndarray) -> Cells:
        """Returns where the newest tokens of these rows are."""
        return Cells(rows, np.full(len(rows), self.newest), self.newest)

    def _decide(
        self, index: int, rows: np.ndarray, state: Tensor, before: Tensor, due: np.ndarray, said: dict
    ) -> tuple[np.ndarray, np.ndarray]:
        """Asks one gate, and keeps what those say whom it lets out; returns them as rows of the batch, and the place in
        `rows` of each one's."""
        who, places = self._riders(rows)
        asked = self.asks[index, who] & ~due[places]
        who, (needed, places) = who[asked], np.unique(places[asked], return_inverse=True)
        if not len(who):
            return who, places
        rows, state, before = rows[needed], at(state, needed), at(before, needed)
        gate, logits, ids, read = self.exits.gates[index], None, None, partial(self.exits.logits, self.backbone, index)
        early = self.probe or gate.reads_logits
        if early:
            normed = self._head(index, rows, state, who)
            logits, ids = read(normed)
        scores = gate.score(state[:, 0], logits, before[:, 0]).float().cpu().numpy()[places]
        self.now["scores"][who, index] = scores
        if self.probe:
            said[index] = who, at(best(logits, ids), places)
            return who[:0], places[:0]
        left = self.policies.leaves(index, scores, who, self.record.progress)
        who, (leaving, told), places = who[left], np.unique(places[left], return_inverse=True), needed[places[left]]
        if len(who):
            self.now["taken"][who] = index
            if early:
                logits, ids = at(logits, leaving), ids if ids is None or ids.dim() == 1 else at(ids, leaving)
                normed = at(normed, leaving)
            else:
                normed = self._head(index, rows[leaving], at(state, leaving), who)
                if self.exits.sizes[index] is None:
                    self.unread.append((self._newest(rows[leaving]), normed, who, told))
                    return who, places
                logits, ids = read(normed)
            self.listed.append((who, at(normed, told)))
            self.parts.append((who, at(spread(logits.float(), ids, self.backbone.vocab_size), told)))
        return who, places

    def _head(self, index: int, rows: np.ndarray, state: Tensor, who: np.ndarray) -> Tensor:
        """Returns the normed states [rows, hidden] that an exit's head makes of the newest tokens of these rows of the
        K/V, for rows of the batch `who`."""
        head, lane = self.exits.heads[index], self.heads[index]
        self.now["headed"][who, index] = True
        if lane is None:
            normed = head(state)
        elif lane.lane is None:
            normed = lane.shared_features(state, self._calls(rows))
        else:
            normed = lane.own_features(rows, self.tokens, self.members.lead)
            self.record.catch_up(index, who)
        return normed[:, 0]

    def _keep(self, index: int, done: list[tuple[Cells, Tensor]]) -> None:
        """Keeps states at an exit for those who may wait there, and for a block head with K/V of its own."""
        for lane in (self.lanes[index], self.heads[index] and self.heads[index].lane):
            if lane is not None:
                for cells, states in done:
                    lane.keep(cells, states)

    def _fill(
        self, index: int, rows: np.ndarray, state: Tensor, who: np.ndarray, places: np.ndarray, stays: np.ndarray
    ) -> None:
        """Fills what lies beyond the exit, K/V and deeper heads' states, from the states [rows, 1, hidden] at `rows` of
        the K/V, for rows `who` of the batch, each at its place in `rows`. Who leaves where somebody stays gets a copy.
        """
        gone, left = rows[~stays], at(state, np.flatnonzero(~stays))
        mixed = stays[places]
        if mixed.any():
            before, source = len(self.members), self._split(who[mixed], places[mixed])
            self.calls = select_rows(self.calls, before, torch.as_tensor(source, device=self.device))
            self.narrowed, gone = {}, np.concatenate([gone, np.arange(before, len(source))])
            left = torch.cat([left, at(state, np.unique(places[mixed]))])
        depth, last = self.depths[index], self.backbone.num_layers
        self.backbone.fill(left, self._calls(gone), depth, last, self.kv, self.exits.fills[index])
        cells = self._newest(gone)
        for deeper in range(index + 1, len(self.depths)):
            self._keep(deeper, [(cells, left)])
