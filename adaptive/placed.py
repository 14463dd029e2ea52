"""The newest token of every row, at a place that is a tensor: always the same kernels on the same memory.

`Backbone.start` has the model prepare what its blocks need, anew for every token, in some hundred small operations.
Here that is looked up: rotary angles by position, masks by column, keys and values written by index. So a CUDA graph of
it can be replayed at the next token. For blocks that `straight.py` knows, with the attention of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive.backbone import Backbone

GROWING = ("dynamic", "longrope")  # rotary angles that change as a text grows


class Placed:
    """Inputs, K/V and calls of the blocks for one token of each row.

    Args:
        backbone: of a kind that `fits`.
        batch: rows.
        capacity: columns that there is room for.

    Attributes:
        ids: [batch, 1], the newest tokens.
        column: [1], where they are; `begin` moves it on.
        padding: [batch], columns on the left of each row.
        buffer: K/V [blocks, 2, batch, kv heads, capacity, head dim].
    """

    def __init__(self, backbone: Backbone, batch: int, capacity: int):
        self.backbone, self.capacity, self.device = backbone, capacity, backbone.device
        heads, dim, _ = backbone.kv_shapes
        shape = (backbone.num_layers, 2, batch, heads, capacity, dim)
        self.buffer = torch.zeros(shape, dtype=backbone.norm_dtype, device=self.device)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.column, self.padding = self.ids.new_zeros(1), self.ids.new_zeros(batch)
        self.columns = torch.arange(capacity, device=self.device)
        # What the model says to the blocks at every place there is: angles do not depend on the tokens.
        self.embed = backbone.inner.get_input_embeddings()
        calls = backbone.start(self.columns[None] * 0, None, self.columns[None], None)[1]
        # Of tensors the angles are kept: masks would be as large as the capacity squared.
        kept = ({k: v for k, v in kwargs.items() if not isinstance(v, Tensor)} for _, kwargs in calls)
        self.calls = [((), kwargs) for kwargs in kept]

    @staticmethod
    def fits(backbone: Backbone) -> bool:
        """Returns whether this gives what the model's own preparation does."""
        config = backbone.config  # of transformers, as are the arguments of blocks in `begin`
        ropes = getattr(config, "rope_parameters", None) or {}
        kinds = [rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]
        if not (backbone.straightens and backbone.packs and backbone.kv_shapes[1] == backbone.kv_shapes[2]):
            return False
        if torch.is_autocast_enabled(backbone.device.type):  # K/V would come in another type
            return False
        if config._attn_implementation != "sdpa" or set(kinds) & set(GROWING):
            return False
        ids = torch.arange(4, device=backbone.device)[None] % backbone.vocab_size
        embedded, calls = backbone.start(ids, None, ids, None)
        plain = torch.equal(embedded, backbone.inner.get_input_embeddings()(ids))
        return plain and all(not args and "position_embeddings" in kwargs for args, kwargs in calls)

    def begin(self) -> tuple[Tensor, list]:
        """Moves on by a column; returns embeddings [batch, 1, hidden] of the newest tokens and the calls of all blocks
        for them."""
        self.column.add_(1)
        position = (self.column - self.padding).clamp_min(0)
        seen = (self.columns <= self.column) & (self.columns >= self.padding[:, None])
        masks, angles, calls = {}, {}, []
        for index, (_, kwargs) in enumerate(self.calls):
            window, table = self.backbone.window(index), kwargs["position_embeddings"]
            if window not in masks:
                near = seen if window is None else seen & (self.columns > self.column - window)
                masks[window] = near[:, None, None]
            if id(table) not in angles:
                angles[id(table)] = tuple(part[0].index_select(0, position)[:, None] for part in table)
            given = {"attention_mask": masks[window], "position_embeddings": angles[id(table)]}
            calls.append(((), kwargs | given | {"past_key_values": self}))
        return self.embed(self.ids), calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple:
        """Writes a block's K/V [batch, kv heads, 1, head dim] at the column; returns those of all columns."""
        keys, values = self.buffer[layer_idx]
        keys.index_copy_(2, self.column, key_states)
        values.index_copy_(2, self.column, value_states)
        return keys, values

    def fill(self, state: Tensor, calls: list, first: int, who: Tensor, fitted=None) -> None:
        """Writes the K/V of blocks `first` and deeper at the column as `Backbone.fill` does, for the rows `who`.

        Args:
            state: [batch, 1, hidden] that they left with.
            calls: from `begin`.
            first: the first block that they skip.
            who: [batch] bool.
            fitted: the exit's `fills.Fill`, or None.
        """
        last = self.backbone.num_layers
        made = torch.stack(self.backbone.projections.project(state, calls, first, last, fitted), dim=1)
        skipped = self.buffer[first:]
        old = skipped.index_select(4, self.column)
        skipped.index_copy_(4, self.column, torch.where(who[:, None, None, None], made, old))
