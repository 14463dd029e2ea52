"""A model as graphs and arrays: segments, heads, fills, embedding rows, gates."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from adaptive import graphs, recipes
from adaptive.data import digest
from adaptive.exits import ADAPTED
from adaptive.losses import prior_shift
from adaptive.onnx_graph import INTEGER
from adaptive.quantize import quantize, quantize_rows, restore
from adaptive.smooth import BITS, Smooth

# Bytes of the LM head's weights. Up to here multiplying by all of them takes no longer than a screen, which does more
# of its work one row at a time and on one thread.
WHOLE = 2**25


class Writer:
    """Writes the graphs and arrays of one model.

    Args:
        model: the `EarlyExitModel`.
        folder: to write to.
        bits: of the weights: 32, 8 or 4.
        compact: leave out the second copy of quantized blocks, for long prompts.
    """

    def __init__(self, model, folder: Path, bits: int, compact: bool = False):
        self.model, self.view, self.folder, self.bits = model, model.view, folder, bits
        self.copies = {"segment": bits} | ({} if compact or bits == 32 else {"prompt": INTEGER})
        config = self.view.config
        self.ropes, self.rope_of = recipes.ropes(config, self.view.decoder)
        self.shape = recipes.shape(config, self.view.blocks[0], 2 * len(self.ropes[0]["inverse"]))
        self.bounds = sorted({*model.depths, self.view.num_layers})
        self.slots = self.view.num_layers
        self.smooth = Smooth(self.view, self.shape) if bits == BITS else None

    def path(self, name: str) -> Path:
        """Returns where a graph goes."""
        return self.folder / f"{name}.onnx"

    def array(self, name: str, values: np.ndarray) -> None:
        """Writes an array."""
        np.save(self.folder / f"{name}.npy", values, allow_pickle=False)

    def blocks(self, first: int, last: int):
        """Yields the recipes of blocks first..last-1, one in memory at a time."""
        for index in range(first, last):
            block = self.block(self.view.blocks[index], index)
            yield block if self.smooth is None else self.smooth.block(block, index)

    def block(self, module, index: int) -> recipes.Block:
        """Returns the recipe of a block, or of a copy of block `index` in a head."""
        return recipes.block(module, self.shape, self.view.window(index), self.rope_of[index])

    def write(self) -> dict:
        """Writes everything that the model consists of; returns what the manifest says of it."""
        total = len(self.bounds) * len(self.copies) + 2 + 3 * self.model.num_exits
        self.bar = tqdm(total=total, desc="exporting", unit="graph", leave=False)
        with self.bar:
            for kind, bits in self.copies.items():
                for index, (first, last) in enumerate(zip([0, *self.bounds], self.bounds)):
                    final = recipes.norm(self.view.norm) if last == self.view.num_layers else None
                    graphs.segment(self.path(f"{kind}_{index}"), self.blocks(first, last), self.shape, first,
                                   len(self.ropes), bits, self._gate(last), final)  # fmt: skip
                    self.bar.update()
            self._vocabulary("vocabulary", recipes.linear(self.view.head))
            embedding = self.view.inner.get_input_embeddings()
            self._table("embedding", recipes.array(embedding.weight))
            exits = [self._exit(index) for index in range(self.model.num_exits)]
        return {
            "shape": asdict(self.shape),
            "layers": self.view.num_layers,
            "vocab": self.view.vocab_size,
            "max_context": self.view.max_context,
            "softcap": self.view.softcap,
            "embedding_factor": float(getattr(embedding, "scalar_embed_scale", 1.0)),
            "slots": self.slots,
            "segments": self.bounds,
            "exits": exits,
            "ropes": self.ropes,
            "rope_of": self.rope_of,
        }

    def _table(self, name: str, values: np.ndarray) -> None:
        """Writes rows [rows, hidden] that are read one by one: in 8 bits unless weights are not quantized."""
        if self.bits == 32:
            self.array(name, values)
        else:
            rows, scales = quantize_rows(values)
            self.array(name, rows)
            self.array(f"{name}_scale", scales)

    def _head_rows(self) -> str:
        """Returns the name of the LM head's rows, to be read one by one.

        They are as coarse as the head is as a product: better ones would give the survivors of a screen other logits
        than the full depth gives them, and the folder judges its exits by its own full depth.
        """
        embedding, head = self.view.inner.get_input_embeddings(), self.view.head
        if head.bias is not None:
            self.array("head_bias", recipes.array(head.bias))
        if self.bits == 32 and embedding.weight.data_ptr() == head.weight.data_ptr():
            return "embedding"
        if not (self.folder / "head.npy").exists():
            rows = recipes.array(head.weight)
            if self.bits < 32:
                rows = restore(*quantize(rows, self.bits), self.bits, rows.shape[1])
            self._table("head", rows)
        return "head"

    def _vocabulary(self, name: str, head: recipes.Linear) -> None:
        graphs.vocabulary(self.path(name), head, self.shape, self.bits, self.view.softcap)
        self.bar.update()

    def _exit(self, index: int) -> dict:
        """Writes what one exit needs; returns its entry in the manifest.

        A token that leaves is one call, two with the whole vocabulary: a head without attention fills the K/V of the
        blocks skipped as well, unless its gate wants to see its logits and mostly stays.
        """
        depth, head, gate = self.model.depths[index], self.model.exits.heads[index], self.model.exits.gates[index]
        record = {"depth": depth, "segment": self.bounds.index(depth), "features": f"exit_{index}", "fill": None}
        found, rows = self._entries(index)
        filled = self._filled(index) if depth < self.view.num_layers else None
        self.bar.update()
        at_once = head.kind != "block" and (gate.learned or gate.kind == "similarity")
        if filled is not None:
            record["fill"] = f"exit_{index}" if at_once else f"fill_{index}"
            if not at_once:
                graphs.fill(self.path(f"fill_{index}"), self.shape, self.bits, *filled)
        self.bar.update()
        record["slot"], record["borrowed"] = self._head(index, rows, filled if at_once else None)
        if head.kind == "block" and rows is not None:
            found["vocabulary"] = f"rows_{index}"
            self._vocabulary(found["vocabulary"], rows)
        self.bar.update()
        return record | found | {"gate": gate.kind}

    def _filled(self, index: int) -> tuple:
        """Returns what `graphs.fill_outputs` needs of an exit."""
        fill, fitted = self.model.exits.fills[index], None
        if fill is not None:
            weight, bias = (recipes.array(part.transpose(0, 1)) for part in (fill.weight, fill.bias))
            fitted = recipes.Linear(weight.reshape(-1, self.shape.hidden), bias.reshape(-1))
            fitted = fitted if self.smooth is None else self.smooth.fill(fitted, self.model.depths[index])
        return self.blocks(self.model.depths[index], self.view.num_layers), fitted

    def _head(self, index: int, rows: recipes.Linear | None, filled: tuple | None) -> tuple[int | None, list[int]]:
        """Writes a head's graph; returns the first slot of its own K/V, if it has any, and the slots of the backbone's
        K/V that it reads."""
        head, path = self.model.exits.heads[index], self.path(f"exit_{index}")
        norm = recipes.norm(head.norm)
        if head.kind != "block":
            pair = (recipes.linear(head.down), recipes.linear(head.up)) if head.kind in ADAPTED else None
            mlps = [recipes.gated_mlp(mlp, self.shape.act) for mlp in getattr(head, "mlps", ())]
            mlps = mlps if self.smooth is None else self.smooth.mlps(mlps, self.model.depths[index], pair)
            capped = None if rows is None else (rows, self.view.softcap)
            graphs.head(path, norm, self.shape, self.bits, pair, mlps, capped, filled)
            return None, []
        blocks = [self.block(block, source) for block, source in zip(head.blocks, head.sources, strict=True)]
        own, count = self.model.exit_config.head_kv == "own", len(blocks)
        slot = self.slots if own else self.model.depths[index] - count
        if self.smooth is not None and not own:
            blocks = [self.smooth.reading(block, index) for index, block in enumerate(blocks, start=slot)]
        graphs.block_features(path, norm, blocks, self.shape, slot, len(self.ropes), self.bits, own)
        if not own:
            return None, list(range(slot, slot + count))
        self.slots += count
        return slot, []

    def _entries(self, index: int) -> tuple[dict, recipes.Linear | None]:
        """Returns what the manifest says of an exit's vocabulary, and the rows of its shortlist if it has one; writes
        the preview that picks them, once if exits share it.

        Where a screen would not pay, its exits get the whole vocabulary: nothing that it might have missed.
        """
        exits, stored = self.model.exits, self.path("vocabulary").with_suffix(".bin")
        if exits.screened(index) and stored.stat().st_size > WHOLE:
            if not self.path("preview").exists():
                down = recipes.Linear(recipes.array(exits.screen.down))
                up = recipes.Linear(recipes.array(exits.screen.up), recipes.array(exits.screen.bias))
                graphs.preview(self.path("preview"), down, up, self.shape, self.bits)
            found = {"vocabulary": "preview", "entries": "picked", "count": exits.sizes[index]}
            return found | {"rows": self._head_rows()}, None
        ids = exits.shortlist(index)
        if ids is None:
            return {"vocabulary": "vocabulary", "entries": "all"}, None
        ids, head = ids.cpu().numpy(), recipes.linear(self.view.head)
        name = f"shortlist_{digest(ids.tobytes())[:8]}"
        if not (self.folder / f"{name}.npy").exists():
            self.array(name, ids.astype(np.int32))
        rows = recipes.Linear(head.weight[ids], None if head.bias is None else head.bias[ids])
        return {"vocabulary": None, "entries": "fixed", "ids": name}, rows

    def _gate(self, depth: int) -> tuple | None:
        """Returns (norm, layers) of the learned gate at a depth, None if there is none."""
        depths = list(self.model.depths)
        gate = self.model.exits.gates[depths.index(depth)] if depth in depths else None
        if gate is None or not gate.learned:
            return None
        layers, shift = [gate.read] if gate.kind == "linear" else [gate.read[0], gate.read[2]], prior_shift(gate.prior)
        layers = [recipes.linear(layer) for layer in layers]
        layers[-1].bias = layers[-1].bias + np.float32([float(shift)])
        return recipes.norm(gate.norm), layers
