"""A model as graphs and arrays: segments, heads, fills, embedding rows, gates."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from adaptive import graphs, recipes
from adaptive.anatomy import plain_copy
from adaptive.data import digest
from adaptive.losses import prior_shift
from adaptive.quantize import quantize_rows
from adaptive.reading import Text, gram, watched


class Writer:
    """Writes the graphs and arrays of one model.

    Args:
        model: the `EarlyExitModel`.
        folder: to write to.
        bits: of the weights: 32, 8 or 4.
    """

    def __init__(self, model, folder: Path, bits: int):
        self.model, self.view, self.folder, self.bits = model, model.view, folder, bits
        config = self.view.config
        self.shape = recipes.shape(config, self.view.blocks[0])
        self.ropes, self.rope_of = recipes.ropes(config, self.view.decoder)
        self.bounds = sorted({*model.depths, self.view.num_layers})
        self.slots = self.view.num_layers
        self.text: Text | None = None

    def path(self, name: str) -> Path:
        """Returns where a graph goes."""
        return self.folder / f"{name}.onnx"

    def array(self, name: str, values: np.ndarray) -> None:
        """Writes an array."""
        np.save(self.folder / f"{name}.npy", values, allow_pickle=False)

    def blocks(self, first: int, last: int):
        """Yields the recipes of blocks first..last-1, one in memory at a time."""
        for index in range(first, last):
            module = plain_copy(self.view.blocks[index])
            if self.text is not None and self.text.depth == index:
                self.text.through(module)
            yield self.block(module, index)

    def block(self, module, index: int) -> recipes.Block:
        """Returns the recipe of a block without adapters, or of a copy of block `index` in a head."""
        return recipes.block(module, self.shape, self.view.window(index), self.rope_of[index])

    @torch.no_grad()
    def write(self) -> dict:
        """Writes everything that the model consists of; returns what the manifest says of it."""
        self.bar = tqdm(total=len(self.bounds) + 2 + 3 * self.model.num_exits, desc="exporting", unit="graph",
                        leave=False)  # fmt: skip
        with self.bar:
            self.text = Text(self.model) if self.bits == 4 else None
            for index, (first, last) in enumerate(zip([0, *self.bounds], self.bounds)):
                graphs.segment(self.path(f"segment_{index}"), self.blocks(first, last), self.shape, first,
                                    len(self.ropes), self.bits)  # fmt: skip
                self.bar.update()
            final = self._norm("final", recipes.norm(self.view.norm))
            self.head = recipes.linear(self.view.head)
            if self.text is not None:
                self.head.gram = gram(self.view.norm(self.text.state))
            self._vocabulary("vocabulary", self.head)
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
            "final": final,
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
        """Returns the name of the LM head's rows, to be read one by one; the embedding's where the two are tied."""
        embedding, head = self.view.inner.get_input_embeddings(), self.view.head
        name = "embedding" if embedding.weight.data_ptr() == head.weight.data_ptr() else "head"
        if not (self.folder / f"{name}.npy").exists():
            self._table(name, recipes.array(head.weight))
        if head.bias is not None:
            self.array("head_bias", recipes.array(head.bias))
        return name

    def _norm(self, name: str, norm: recipes.Norm) -> dict:
        """Writes a norm that stands alone; starting a graph for it would take longer than the norm."""
        self.array(f"norm_{name}", norm.weight)
        return {"norm": f"norm_{name}", "eps": norm.eps}

    def _vocabulary(self, name: str, head: recipes.Linear) -> None:
        graphs.vocabulary(self.path(name), head, self.shape, self.bits, self.view.softcap)
        self.bar.update()

    def _exit(self, index: int) -> dict:
        """Writes what one exit needs; returns its entry in the manifest."""
        depth = self.model.depths[index]
        record = {"depth": depth, "segment": self.bounds.index(depth), "slot": None, "borrowed": []}
        if self.model.exits.kinds[index] == "norm":
            record["features"] = self._norm(str(index), recipes.norm(self.model.exits.heads[index].norm))
        else:
            record["features"] = f"exit_{index}"
            record["slot"], record["borrowed"] = self._features(index)
        self.bar.update()
        record |= self._entries(index)
        self.bar.update()
        if depth < self.view.num_layers:
            turned = 2 * len(self.ropes[0]["inverse"])
            blocks, read = self.blocks(depth, self.view.num_layers), None
            if self.text is not None:
                state = self.text.at[depth]
                read = gram(state * state.square().mean(-1, keepdim=True).rsqrt())
            graphs.fill(self.path(f"fill_{index}"), blocks, self.shape, turned, self.bits, read)
        self.bar.update()
        return record | self._gate(index)

    def _features(self, index: int) -> tuple[int | None, list[int]]:
        """Writes a head's graph up to the vocabulary; returns the first slot of its own K/V, if it has any, and the
        slots of the backbone's K/V that it reads."""
        head, path = copy.deepcopy(self.model.exits.heads[index]), self.path(f"exit_{index}")
        norm = recipes.norm(head.norm)
        if self.text is not None:
            with watched(head):
                head(self.text.at[self.model.depths[index]], self.text.calls)
        if head.kind != "block":
            pair = (recipes.linear(head.down), recipes.linear(head.up)) if head.kind == "linear" else None
            mlps = [recipes.gated_mlp(mlp, self.shape.act) for mlp in head.mlps] if head.kind == "mlp" else []
            graphs.features(path, norm, self.shape, self.bits, pair, mlps)
            return None, []
        blocks = [self.block(block, source) for block, source in zip(head.blocks, head.sources, strict=True)]
        own, count = self.model.exit_config.head_kv == "own", len(blocks)
        slot = self.slots if own else self.model.depths[index] - count
        graphs.block_features(path, norm, blocks, self.shape, slot, len(self.ropes), self.bits, own)
        if not own:
            return None, list(range(slot, slot + count))
        self.slots += count
        return slot, []

    def _entries(self, index: int) -> dict:
        """Writes the vocabulary rows of a shortlist, or the preview that picks them, once if exits share them."""
        exits = self.model.exits
        if exits.screened(index):
            if not self.path("preview").exists():
                down = recipes.Linear(recipes.array(exits.screen.down))
                up = recipes.Linear(recipes.array(exits.screen.up), recipes.array(exits.screen.bias))
                graphs.preview(self.path("preview"), down, up, self.shape, self.bits)
            found = {"vocabulary": "preview", "entries": "picked"}
            return found | {"count": exits.sizes[index], "rows": self._head_rows()}
        ids = exits.shortlist(index)
        if ids is None:
            return {"vocabulary": "vocabulary", "entries": "all"}
        ids = ids.cpu().numpy()
        name = f"shortlist_{digest(ids.tobytes())[:8]}"
        if not self.path(name).exists():
            bias = None if self.head.bias is None else self.head.bias[ids]
            rows = recipes.Linear(self.head.weight[ids], bias, self.head.gram)
            graphs.vocabulary(self.path(name), rows, self.shape, self.bits, self.view.softcap)
            self.array(f"{name}_ids", ids.astype(np.int32))
        return {"vocabulary": name, "entries": "fixed"}

    def _gate(self, index: int) -> dict:
        """Writes a gate's weights, in float32, with what its norm multiplies by in them."""
        gate = self.model.exits.gates[index]
        if not gate.learned:
            return {"gate": gate.kind}
        norm, shift = recipes.norm(gate.norm), float(prior_shift(gate.prior))
        if gate.kind == "linear":
            self.array(f"gate_{index}", recipes.array(gate.read.weight)[0] * norm.weight)
            last = gate.read
        else:
            first, last = gate.read[0], gate.read[2]
            self.array(f"gate_{index}_in", recipes.array(first.weight) * norm.weight)
            self.array(f"gate_{index}_in_bias", recipes.array(first.bias))
            self.array(f"gate_{index}", recipes.array(last.weight)[0])
        return {"gate": gate.kind, "eps": norm.eps, "shift": shift + float(last.bias.detach().float())}
