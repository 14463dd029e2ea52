"""What generation cost: FLOPs and bytes per token, from a trace and the shapes of what ran. Plain numpy.

One multiply-add is 2 FLOPs. Counted are matrix products, as `torch.utils.flop_counter` does: linear layers, and
attention's two products over the tokens that a query may see (a kernel that also multiplies masked entries, and throws
them away, runs more). Not counted: embedding rows, norms, rotary tables, activations, softmax, sampling.

Prefill and tokens are kept apart. The prompt runs through all blocks whatever the policy says (`prefill_flops`); the
first generated token is read off the state of the last prompt position, so that it pays for gates and heads only, under
the policy and at full depth alike. Prefill and the tokens' prices add up to the whole of `generate`.

Bytes are those of one row alone (batch 1): weights multiplied are read once per pass, K/V of the tokens seen are read,
the token's own are written, all at `bytes_per_weight`. Not counted: what FLOPs leave out, and activations. A mixture of
experts that catches up with several tokens in one pass may read more experts than the one token's that are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptive.policy import Trace


@dataclass(frozen=True)
class Price:
    """What the tokens of a trace cost. Arrays are [rows, tokens] int, 0 where a row had ended.

    Attributes:
        flops: of each token as decoded; the token that takes waiting ones along, through blocks or a block head, pays
            for them, and a token that was drafted in vain before pays for those drafts.
        full_flops: of the same tokens at the same contexts at full depth, with the full head and without gates.
        bytes: moved by each token as it was decoded, alone in its batch.
        full_bytes: moved by the same tokens at full depth.
        breakdown: FLOPs of all tokens by purpose: "blocks" (linear layers), "attention" (over the context), "fill" (K/V
            of skipped blocks), "gates", "heads" (of exits and of the full depth, vocabulary and block heads included),
            "catch_up" (earlier tokens run through block heads), "waiting" (tokens run through blocks that they had been
            let out before), "rejected" (all that was done for drafts that followed a wrong one).
        saved: shares of all `full_flops`: "depth" (blocks not run, less fill and what waiting tokens run later),
            "shortlist" (vocabulary rows not read), "overhead" (gates, what heads do before the vocabulary, heads that
            only gates read, block heads catching up, drafts judged and thrown away; never above 0). They add up to
            1 - `relative_flops`.
    """

    flops: np.ndarray
    full_flops: np.ndarray
    bytes: np.ndarray
    full_bytes: np.ndarray
    breakdown: dict[str, int]
    saved: dict[str, float]

    @property
    def relative_flops(self) -> float:
        """FLOPs of all tokens over those at full depth."""
        return float(self.flops.sum() / self.full_flops.sum())

    @property
    def relative_bytes(self) -> float:
        """Bytes moved for all tokens over those at full depth."""
        return float(self.bytes.sum() / self.full_bytes.sum())


class Costs:
    """Prices traces of one model.

    Args:
        shape: of the backbone: `layers`, `hidden`, `vocab` (weights of the LM head), `bytes_per_weight`, and `blocks`,
            one `Backbone.block_shape` per block.
        exits: one dict per exit, from `Exits.shapes`.
    """

    def __init__(self, shape: dict, exits: Sequence[dict]):
        assert len(shape["blocks"]) == shape["layers"], "one shape per block"
        self.shape, self.exits = shape, list(exits)

    def price(self, trace: Trace) -> Price:
        """Returns what every token of `trace` cost, and what it would have cost at full depth.

        Raises:
            ValueError: the trace is of a model with other exits or another depth.
        """
        depths, layers = tuple(exit["depth"] for exit in self.exits), self.shape["layers"]
        if (tuple(trace.exits), trace.layers) != (depths, layers):
            raise ValueError(
                f"the trace has exits {list(trace.exits)} of {trace.layers} blocks, these costs are for "
                f"{list(depths)} of {layers}; price a trace with the costs of the model that made it"
            )
        parts, moved = self._parts(trace)
        valid = trace.valid
        full, full_moved = self._full(trace)
        vocab = self.shape["vocab"]
        full_flops = sum(full.values()) + 2 * vocab * valid
        breakdown = {name: int(part.sum()) for name, part in parts.items()} | {"rejected": 0}
        flops = sum(parts.values())
        if trace.rejected is not None and trace.rejected.valid.any():
            thrown, thrown_moved = self._parts(trace.rejected)
            wasted = sum(thrown.values())
            breakdown["rejected"] = int(wasted.sum())
            # The pass with c tokens of context was a try at token c - prompt of its row.
            place = np.minimum(trace.rejected.context - trace.prompt[:, None], valid.sum(axis=1)[:, None] - 1)
            rows = np.broadcast_to(np.arange(len(place))[:, None], place.shape)
            tried = trace.rejected.valid
            np.add.at(flops, (rows[tried], place[tried]), wasted[tried])
            np.add.at(moved, (rows[tried], place[tried]), thrown_moved[tried])

        total = int(full_flops.sum())
        taken_vocab = np.asarray([*(exit["vocab"] for exit in self.exits), vocab, 0])[trace.taken]
        depth = sum(int(full[name].sum()) - breakdown[name] for name in full) - breakdown["waiting"]
        shortlist = 2 * int((vocab * valid - taken_vocab).sum())
        overhead = total - int(flops.sum()) - depth - shortlist
        saved = {"depth": depth / total, "shortlist": shortlist / total, "overhead": overhead / total}
        size = self.shape["bytes_per_weight"]
        return Price(flops, full_flops, size * moved, size * (full_moved + vocab * valid), breakdown, saved)

    def units(self) -> tuple[list[int], list[int], int]:
        """Returns weights: of the blocks up to each exit from the one before, and up to full depth [exits + 1]; of each
        exit's gate and head [exits]; and of the full depth's LM head."""
        stops = [0, *(exit["depth"] for exit in self.exits), self.shape["layers"]]
        blocks = [block["weights"] for block in self.shape["blocks"]]
        heads = [
            exit["gate"] + exit["head"] + exit["vocab"] + sum(block["weights"] for block in exit["blocks"])
            for exit in self.exits
        ]
        return [sum(blocks[a:b]) for a, b in zip(stops, stops[1:], strict=False)], heads, self.shape["vocab"]

    def prefill_flops(self, prompt_tokens: int) -> int:
        """Returns the FLOPs of a prompt through all blocks; gates and heads belong to the first generated token."""
        return sum(
            2 * block["weights"] * prompt_tokens
            + 2 * block["attention"] * int(_seen_by_all(np.int64(prompt_tokens), block["window"]))
            for block in self.shape["blocks"]
        )

    def by_exit(self, context: int, asked: Sequence[bool] | None = None) -> np.ndarray:
        """Returns the FLOPs [exits + 1] of one decoded token that leaves at each exit, the full depth last.

        Gates on the way are asked, and heads evaluated where their gates read them. A block head with K/V of its own is
        counted for every token, wherever it leaves: sooner or later the head catches up with it.

        Args:
            context: tokens attended to, the token's own included.
            asked: which exits are open [exits]; None for all. A closed exit's figure is of a token that leaves there
                all the same.
        """
        count, layers = len(self.exits), self.shape["layers"]
        asked = [True] * count if asked is None else list(asked)
        depth = np.asarray([*(exit["depth"] for exit in self.exits), layers])
        leaves, here = np.arange(count + 1), np.full(count + 1, context, np.int64)
        flops = sum(self._chain(here, depth, np.ones(count + 1, bool))[0].values())
        for index, exit in enumerate(self.exits):
            open_here = (leaves > index) & asked[index] | (leaves == index)
            headed = open_here if exit["reads_logits"] else leaves == index
            through = np.full(count + 1, asked[index]) | headed if exit["own_kv"] else headed
            flops = flops + 2 * exit["gate"] * open_here + 2 * (exit["head"] + exit["vocab"]) * headed
            flops = flops + through * sum(_through(block, here) for block in exit["blocks"])
        flops[-1] += 2 * self.shape["vocab"]
        return flops

    def _full(self, trace: Trace) -> tuple[dict, np.ndarray]:
        """Returns FLOPs by purpose and numbers moved of the blocks, had every token of a trace gone through all."""
        context = np.where(trace.valid, trace.context, 0).astype(np.int64)
        return self._chain(context, np.full_like(trace.depth, self.shape["layers"]), context > trace.prompt[:, None])

    def _parts(self, trace: Trace) -> tuple[dict, np.ndarray]:
        """Returns FLOPs by purpose [rows, tokens] of all that a trace says, and numbers moved."""
        valid, context = trace.valid, np.where(trace.valid, trace.context, 0).astype(np.int64)
        decoded = context > trace.prompt[:, None]  # the first token is read off the prompt's last state
        parts, moved = self._chain(context, trace.depth, decoded, trace.kv == "propagate")
        on_exits, exits_moved = self._exits(trace, valid, context)
        behind = np.zeros((*context.shape, len(self.exits)), np.int64) if trace.behind is None else trace.behind
        waiting, waiting_moved = self._waiting(context, trace.depth, behind)
        last, vocab = trace.taken == len(self.exits), self.shape["vocab"]
        judged = behind[..., -1] if trace.kv == "verify" and self.exits else 0  # drafts that the LM head reads, too
        on_exits["heads"] = on_exits["heads"] + 2 * vocab * last * (1 + judged)
        return parts | on_exits | {"waiting": waiting}, moved + exits_moved + waiting_moved + vocab * last

    def _waiting(self, context: np.ndarray, depth: np.ndarray, behind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns FLOPs and numbers moved of tokens run through blocks that they had been let out before, `behind`
        [rows, tokens, exits] from each exit to the next. They share the newest token's read of weights, and of K/V but
        for their windows' reach; where the newest is one of them, as it left at a lesser `depth`, reads are theirs."""
        flops, moved = np.zeros_like(context), np.zeros_like(context)
        stops = [*(exit["depth"] for exit in self.exits), self.shape["layers"]]
        for index, (first, last) in enumerate(zip(stops, stops[1:], strict=False)):
            count = behind[..., index].astype(np.int64)
            newest = (count > 0) & (depth <= first)
            end = np.maximum(context - ~newest, 0)
            for block in self.shape["blocks"][first:last]:
                window = block["window"]
                attended = _seen_by_all(end, window) - _seen_by_all(np.maximum(end - count, 0), window)
                flops += 2 * block["weights"] * count + 2 * block["attention"] * attended
                reach = _seen(context, None if window is None else window + count - newest)
                reach = reach - _seen(context, window) * ~newest
                moved += block["kv"] * (count + reach) + block["weights"] * newest
        return flops, moved

    def _chain(
        self, context: np.ndarray, depth: np.ndarray, decoded: np.ndarray, fills: bool = True
    ) -> tuple[dict, np.ndarray]:
        """Returns FLOPs by purpose and numbers moved, of `depth` blocks run and, if it `fills`, the others' K/V, where
        `decoded`."""
        parts = {name: np.zeros_like(context) for name in ("blocks", "attention", "fill")}
        moved = np.zeros_like(context)
        for index, block in enumerate(self.shape["blocks"]):
            ran, filled = decoded & (depth > index), decoded & (depth <= index) & fills
            seen = _seen(context, block["window"])
            parts["blocks"] += 2 * block["weights"] * ran
            parts["attention"] += 2 * block["attention"] * seen * ran
            parts["fill"] += 2 * block["fill"] * filled
            moved += (block["weights"] + block["kv"] * (seen + 1)) * ran + (block["fill"] + block["kv"]) * filled
        return parts, moved

    def _exits(self, trace: Trace, valid: np.ndarray, context: np.ndarray) -> tuple[dict, np.ndarray]:
        """Returns FLOPs by purpose and numbers moved, of the gates asked and the exit heads evaluated."""
        parts = {name: np.zeros_like(context) for name in ("gates", "heads", "catch_up")}
        moved = np.zeros_like(context)
        for index, exit in enumerate(self.exits):
            asked = valid & ~np.isnan(trace.scores[..., index])
            headed = valid & trace.headed[..., index]
            parts["gates"] += 2 * exit["gate"] * asked
            parts["heads"] += 2 * (exit["head"] + exit["vocab"]) * headed
            moved += exit["gate"] * asked + (exit["head"] + exit["vocab"]) * headed
            columns = (valid * trace.caught_up[..., index] if exit["own_kv"] else headed).astype(np.int64)
            assert (columns >= headed).all(), "a head that was read has been run"
            for block in exit["blocks"]:
                window = block["window"]
                newest = headed * _through(block, context)
                attended = _seen_by_all(context, window) - _seen_by_all(np.maximum(context - columns, 0), window)
                parts["heads"] += newest
                parts["catch_up"] += 2 * block["weights"] * columns + 2 * block["attention"] * attended - newest
                # The columns of one pass share a read of the weights, and one of the K/V that any of them sees.
                reach = _seen(context, None if window is None else window + columns - 1)
                written = columns * exit["own_kv"]
                moved += (block["weights"] + block["kv"] * reach) * (columns > 0) + block["kv"] * written
        return parts, moved


def _seen(context: np.ndarray, window) -> np.ndarray:
    """Returns how many tokens a query at each `context` attends to."""
    return context if window is None else np.minimum(context, window)


def _seen_by_all(context: np.ndarray, window: int | None) -> np.ndarray:
    """Returns the sum of `_seen` over the contexts 1..`context`."""
    beyond = 0 if window is None else np.maximum(context - window, 0)
    return context * (context + 1) // 2 - beyond * (beyond + 1) // 2


def _through(block: dict, context: np.ndarray) -> np.ndarray:
    """Returns the FLOPs of one token at each `context` in a block."""
    return 2 * block["weights"] + 2 * block["attention"] * _seen(context, block["window"])
