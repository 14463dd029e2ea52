"""The decoding loop: one token per row walks down the chain of segments until a gate lets it out.

`decode` is handed to `generate(custom_generate=...)` of transformers, which prepares logits processors, stopping
criteria and masks. The prompt is prefilled at full depth; the policy applies to every generated token, the first
included.
Skipped blocks get K/V from the state that the token left with ("propagate"). Rows that have left, or ended, are taken
out of the batch for the deeper segments: a row never depends on its neighbours, nor pays for them (but for block heads
with K/V of their own, which catch up for all rows at once).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaptive.backbone import Backbone, select_rows
from adaptive.exits import Exits, best
from adaptive.kv import KV
from adaptive.lanes import GROWTH, BlockLane, Tokens
from adaptive.losses import regret
from adaptive.policy import ExitPolicy, Trace

SHRINK = 0.75  # rows that ended are dropped from the K/V, a copy, once no more than this share is alive


class Walk:
    """Walks the newest token of every live row down the chain of segments, and writes the trace of it.

    Args:
        backbone: the blocks.
        exits: heads and gates.
        depths: of the exits.
        policy: who leaves where.
        tokens: the batch, prompt first; the caller appends.
        probe: ask every gate and head at every token, let nobody leave, and record the regret of each exit's token.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits,
        depths: tuple[int, ...],
        policy: ExitPolicy,
        tokens: Tokens,
        probe: bool = False,
    ):
        self.backbone, self.exits, self.depths, self.policy, self.tokens = backbone, exits, depths, policy, tokens
        self.probe, self.device = probe, tokens.ids.device
        self.members = np.arange(len(tokens.ids))  # which rows of the batch the K/V hold
        self.asked = [probe or policy.asks(index) for index in range(len(depths))]
        self.kv = KV(backbone.num_layers, tokens.length + GROWTH, len(self.members))
        own = exits.config.head_kv == "own"
        self.lanes = [
            BlockLane(backbone, head, depth, own, self.kv) if head.kind == "block" and asked else None
            for head, depth, asked in zip(exits.heads, depths, self.asked, strict=True)
        ]
        self.columns: list[dict[str, np.ndarray]] = []

    def prefill(self) -> Tensor:
        """Runs the prompt at full depth; returns logits [batch, vocabulary] of the first new token."""
        tokens = self.tokens
        hidden, calls = self.backbone.start(tokens.ids, tokens.mask, tokens.positions, self.kv)
        states, depth = [hidden[:, -1:]], 0
        for index, next_depth in enumerate(self.depths):
            hidden, depth = self.backbone.run(hidden, calls, depth, next_depth), next_depth
            self._keep(index, None, hidden)
            states.append(hidden[:, -1:])
        states.append(self.backbone.run(hidden, calls, depth, self.backbone.num_layers)[:, -1:])
        self._begin()
        return self._finish(self._descend(states[0], states[1:]), self.members)

    def step(self, live: np.ndarray) -> Tensor:
        """Runs the newest token of the rows `live`; returns logits [batch, vocabulary], 0 in other rows."""
        if len(live) <= SHRINK * len(self.members):
            self._shrink(np.isin(self.members, live))
        return self._finish(self._descend(self._begin(), None), live)

    def trace(self) -> Trace:
        """Returns what was done so far."""
        stack = {name: np.stack([column[name] for column in self.columns], axis=1) for name in self.columns[0]}
        prompt = self.tokens.prompt.cpu().numpy()
        return Trace(exits=self.depths, layers=self.backbone.num_layers, prompt=prompt, **stack)

    def _shrink(self, keep: np.ndarray) -> None:
        """Drops rows [members] that have ended from the K/V."""
        self.members = self.members[keep]
        kept = torch.as_tensor(np.flatnonzero(keep), device=self.device)
        self.kv.select(kept)
        for lane in self.lanes:
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
        }
        if self.probe:
            self.now["regret"] = np.full((size, count), np.nan, np.float32)
        self.kv.column, self.kv.rows, self.narrowed = self.tokens.length - 1, None, {}
        hidden, self.calls = self.backbone.start(*self.tokens.since(self.kv.column, self.members), self.kv)
        return hidden

    def _finish(self, logits: Tensor, live: np.ndarray) -> Tensor:
        """Writes the column of the trace, and returns logits [batch, vocabulary] from those of the members."""
        batch, column = len(self.tokens.ids), {}
        for name, values in self.now.items():
            empty = {"taken": -1, "scores": np.nan, "regret": np.nan}.get(name, 0)
            column[name] = np.full((batch, *values.shape[1:]), empty, values.dtype)
            column[name][live] = values[np.isin(self.members, live)]
        self.columns.append(column)
        if len(self.members) == batch:
            return logits
        out = logits.new_zeros(batch, logits.shape[1])
        return out.index_copy_(0, torch.as_tensor(self.members, device=self.device), logits)

    def _calls(self, rows: np.ndarray) -> list:
        """Returns the block calls for these rows and points the K/V at them."""
        if len(rows) == len(self.members):
            self.kv.rows = None
            return self.calls
        key = rows.tobytes()
        if key not in self.narrowed:
            index = torch.as_tensor(rows, device=self.device)
            self.narrowed[key] = (index, select_rows(self.calls, len(self.members), index))
        self.kv.rows, calls = self.narrowed[key]
        return calls

    def _descend(self, hidden: Tensor, prefilled: list | None) -> Tensor:
        """Returns logits [members, vocabulary]; rows are taken out of the walk as they leave.

        Args:
            hidden: embeddings [members, 1, hidden] of the newest tokens.
            prefilled: states [members, 1, hidden] at every exit and at full depth, if the blocks have been run already.
        """
        out = torch.zeros(len(self.members), self.backbone.vocab_size, dtype=torch.float32, device=self.device)
        said: dict[int, Tensor] = {}
        rows, state, depth = np.arange(len(self.members)), hidden, 0
        for index, exit_depth in enumerate(self.depths):
            if not self.asked[index]:
                continue
            before = state
            if prefilled is None:
                state, depth = self.backbone.run(state, self._calls(rows), depth, exit_depth), exit_depth
                self._keep(index, rows, state)
            else:
                state = prefilled[index][torch.as_tensor(rows, device=self.device)]
            leave = self._decide(index, rows, state, before, out, said)
            if leave.any():
                gone = torch.as_tensor(leave, device=self.device)
                if prefilled is None:
                    self._skip(index, rows[leave], state[gone])
                rows, state = rows[~leave], state[~gone]
            if not len(rows):
                return out
        where = torch.as_tensor(rows, device=self.device)
        if prefilled is None:
            state = self.backbone.run(state, self._calls(rows), depth, self.backbone.num_layers)
        else:
            state = prefilled[-1][where]
        full = self.backbone.logits(self.backbone.norm(state))[:, 0].float()
        self.now["taken"][rows] = len(self.depths)
        for index, ids in said.items():
            self.now["regret"][rows, index] = regret(full, ids).cpu().numpy()
        return full if len(rows) == len(out) else out.index_copy_(0, where, full)

    def _decide(
        self, index: int, rows: np.ndarray, state: Tensor, before: Tensor, out: Tensor, said: dict
    ) -> np.ndarray:
        """Asks one gate; writes the logits of the rows it lets out; returns which those are, [rows] bool."""
        gate, early = self.exits.gates[index], self.probe or self.exits.gates[index].reads_logits
        logits, ids = self._head(index, rows, state) if early else (None, None)
        scores = gate.score(state[:, 0], None if logits is None else logits, before[:, 0]).float().cpu().numpy()
        self.now["scores"][rows, index] = scores
        if self.probe:
            said[index] = best(logits, ids)
            return np.zeros(len(rows), bool)
        leave = self.policy.leaves(index, scores)
        if leave.any():
            gone = torch.as_tensor(leave, device=state.device)
            if early:
                logits, ids = logits[gone], ids if ids is None or ids.dim() == 1 else ids[gone]
            else:
                logits, ids = self._head(index, rows[leave], state[gone])
            out[torch.as_tensor(rows[leave], device=state.device)] = self._spread(logits.float(), ids)
            self.now["taken"][rows[leave]] = index
        return leave

    def _head(self, index: int, rows: np.ndarray, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns an exit's logits [rows, entries] for the newest token of these rows, and whose they are."""
        head, lane = self.exits.heads[index], self.lanes[index]
        self.now["headed"][rows, index] = True
        if lane is None:
            normed = head(state)
        else:
            normed, caught_up = lane.features(
                state, rows, self._calls(rows), lambda column: self.tokens.since(column, self.members)
            )
            self.now["caught_up"][:, index] += caught_up
        return self.exits.logits(self.backbone, index, normed[:, 0])

    def _spread(self, logits: Tensor, ids: Tensor | None) -> Tensor:
        """Returns logits [rows, vocabulary] from those of a shortlist; what is not on it cannot be said."""
        if ids is None:
            return logits
        full = logits.new_full((len(logits), self.backbone.vocab_size), -torch.inf)
        return full.scatter_(1, ids.expand_as(logits), logits)

    def _keep(self, index: int, rows: np.ndarray | None, states: Tensor) -> None:
        if self.lanes[index] is not None:
            column = 0 if rows is None else self.kv.column
            self.lanes[index].keep(column, rows, states)

    def _skip(self, index: int, rows: np.ndarray, state: Tensor) -> None:
        """Fills what lies beyond the exit from the state that the rows left with: K/V and deeper heads' states."""
        self.backbone.fill(state, self._calls(rows), self.depths[index], self.backbone.num_layers, self.kv)
        for deeper in range(index + 1, len(self.depths)):
            self._keep(deeper, rows, state)


@torch.no_grad()
def decode(
    inner,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    *,
    model,
    policy: ExitPolicy,
    probe: bool = False,
    seed: int | None = None,
    streamer=None,
    **model_kwargs,
):
    """Returns generated ids [batch, prompt + new], or transformers' output object with `.trace` added.

    Args:
        inner: the backbone that `generate` was called on.
        input_ids: [batch, prompt], left-padded.
        logits_processor, stopping_criteria, generation_config: as `generate` prepared them.
        model: the `EarlyExitModel`.
        policy: who leaves where.
        probe: see `Walk`.
        seed: row r samples from its own generator, seeded with seed + r: a row alone gives what it gives in a batch.
        streamer: gets every column of new ids.
        **model_kwargs: what `generate` prepared for the model's forward; the mask is used, the cache must be empty.
    """
    _check(generation_config, input_ids, model_kwargs, model.view)
    tokens = Tokens(input_ids, model_kwargs.get("attention_mask"))
    walk = Walk(model.view, model.exits, model.depths, policy, tokens, probe)
    generators = _generators(seed, input_ids) if generation_config.do_sample else None
    scores, logits = _loop(walk, tokens, logits_processor, stopping_criteria, generation_config, generators, streamer)
    if not generation_config.return_dict_in_generate:
        return tokens.ids
    out = GenerateDecoderOnlyOutput(sequences=tokens.ids, scores=scores, logits=logits, past_key_values=None)
    out.trace = walk.trace()
    return out


def _loop(walk: Walk, tokens: Tokens, processors, criteria, config, generators: list | None, streamer) -> tuple:
    """Generates into `tokens` until every row has stopped; returns scores and logits per step, if asked for."""
    keep_scores = config.return_dict_in_generate and config.output_scores
    keep_logits = config.return_dict_in_generate and config.output_logits
    ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    pad = config._pad_token_tensor if ends else None
    unfinished = torch.ones(len(tokens.ids), dtype=torch.bool, device=tokens.ids.device)
    all_scores, all_logits, live = (), (), np.arange(len(tokens.ids))
    logits = walk.prefill()
    while True:
        scores = processors(tokens.ids, logits.clone() if keep_logits else logits)
        chosen = _pick(scores, generators, live)
        if pad is not None:
            chosen = torch.where(unfinished, chosen, pad.to(chosen.device))
        tokens.append(chosen)
        all_scores += (scores,) if keep_scores else ()
        all_logits += (logits,) if keep_logits else ()
        if streamer is not None:
            streamer.put(chosen.cpu())
        unfinished = unfinished & ~criteria(tokens.ids, all_scores if keep_scores else None)
        live = unfinished.nonzero()[:, 0].cpu().numpy()
        if not len(live):
            break
        logits = walk.step(live)
    if streamer is not None:
        streamer.end()
    return all_scores or None, all_logits or None


def _generators(seed: int | None, input_ids: Tensor) -> list[torch.Generator]:
    base = int(torch.randint(2**62, ())) if seed is None else seed
    return [torch.Generator(input_ids.device).manual_seed(base + row) for row in range(len(input_ids))]


def _pick(scores: Tensor, generators: list | None, live: np.ndarray) -> Tensor:
    """Returns the next ids [batch]: the best, or one sampled per live row."""
    if generators is None:
        return scores.argmax(-1)
    # One draw per row from its own generator, turned into an id by the inverse of the cumulated probabilities: the
    # work over the vocabulary is done for all rows at once.
    cumulated = scores.float().softmax(-1).cumsum(-1)
    draws = cumulated.new_zeros(len(scores), 1)
    for row in live:
        draws[row] = torch.rand((), generator=generators[row], device=scores.device)
    total = cumulated[:, -1:]
    # Strictly below the total: an entry of probability 0 behind the last possible one must not be hit by rounding.
    draws = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, draws, right=True)[:, 0]


def _check(config, input_ids: Tensor, model_kwargs: dict, view: Backbone) -> None:
    problems, past_key_values, mask = [], model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    prompt, limit = input_ids.shape[1], view.max_context
    if config.num_beams and config.num_beams > 1:
        problems.append(f"num_beams={config.num_beams}: beam search is not supported; leave it at 1")
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        problems.append("past_key_values holds tokens: continuing from a cache is not supported; pass the whole prompt")
    if mask is not None and (mask.shape != input_ids.shape or (mask.long().diff(dim=1) < 0).any()):
        problems.append("attention_mask must be 0 on the left, where a row is padded, and 1 from there on")
    if limit is not None and prompt > limit:
        problems.append(f"the prompt has {prompt} tokens, the model's context is {limit}; shorten it")
    elif limit is not None and config.max_length > limit and not view.extends:
        problems.append(
            f"prompt and answer may take {config.max_length} tokens, the model has {limit} learned positions; lower "
            "max_new_tokens"
        )
    if prompt == 0:
        problems.append("the prompt is empty; give at least one token")
    if problems:
        raise ValueError("generate: " + "; ".join(problems))
