"""The one file, beside `kv.py`, `straight.py` and `placed.py`, that knows the insides of transformers.

A decoder-only causal LM is seen as: embedding and masks (`start`), blocks that can be run one by one (`run`) or skipped
(`fill`), a final norm (`norm`) and a vocabulary projection (`logits`). Nothing here is written for one architecture:
the model's own forward prepares what its blocks need, and a probe at construction proves that the parts, put together
again, give the model's own logits.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.anatomy import (
    find_blocks,
    find_decoder,
    find_head,
    find_norm,
    linear_size,
    linear_weights,
    require_batch_first,
    require_plain,
)
from adaptive.kv import KV, Filled, PackedFill, packs
from adaptive.straight import UNFIT, straight, straightens
from adaptive.turned import turned

SWAP = threading.RLock()  # held while the list of blocks is not the model's own, and by who needs it to be


class _Recorder(nn.Module):
    """Stands in for a block while the model prepares its inputs: keeps the call, hands the state on."""

    as_tuple = False

    def __init__(self, block: nn.Module, calls: list):
        super().__init__()
        # Past nn.Module's own bookkeeping: the block must not become a child of its stand-in.
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_calls", calls)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block, name)

    def __call__(self, hidden: Tensor, *args, **kwargs):  # not `forward`: it happens for every block at every token
        self._calls.append((hidden, args, kwargs))
        return (hidden, None) if self.as_tuple else hidden


class Backbone:
    """View of a Hugging Face causal LM (or a `PeftModel` around one) as blocks that can be run apart.

    Args:
        model: the causal LM; it is not changed.
        blocks: dotted path of the `ModuleList` of decoder blocks, for models where it is not found by itself.

    Raises:
        ValueError: the blocks, the final norm or the LM head cannot be found, or the parts do not reproduce the model.
    """

    def __init__(self, model: nn.Module, blocks: str | None = None):
        require_plain(model)
        self.model = model
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.inner.config.get_text_config()
        # Counted once: transformers' own assisted decoding changes the config while it runs, and forgets on an error.
        self.num_layers = self.config.num_hidden_layers
        self.parent, self.name = find_blocks(self.inner, self.num_layers, blocks)
        # Kept here, since the list in the model is swapped for stand-ins while another thread prepares its inputs.
        self.blocks: nn.ModuleList = self.parent._modules[self.name]
        self.calls: list = []  # of the stand-ins, while they are in place
        self.stand_ins = nn.ModuleList(_Recorder(block, self.calls) for block in self.blocks)
        self.decoder = find_decoder(self.inner, self.blocks)
        self.head = find_head(self.inner)
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        self.packs, self.packed, self.straightens = False, None, False
        self.norm, self.fill_weights, self.kv_shapes = self._probe()

    @property
    def hidden_size(self) -> int:
        """Width of the state between blocks."""
        return self.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the final norm lives; exits go there too."""
        return next(self.norm.parameters()).device

    @property
    def norm_dtype(self) -> torch.dtype:
        """Type of the final norm's weights, which quantization leaves alone; heads take it too."""
        return next(self.norm.parameters()).dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head."""
        return self.head.weight.shape[0] if isinstance(self.head, nn.Linear) else self.config.vocab_size

    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: KV | None
    ) -> tuple[Tensor, list]:
        """Returns the state at depth 0 and, per block, the arguments that the model would call it with.

        Args:
            input_ids: [batch, tokens] to embed.
            attention_mask: [batch, cached + tokens] with 0 on padding, or None where nothing is padded.
            position_ids: [batch, tokens], or None to let the model count.
            cache: where K/V live; its `column` says how many tokens came before.
        """
        kwargs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": cache is not None}
        if cache is not None:
            kwargs["past_key_values"] = cache
        if position_ids is not None and self._takes_positions:
            kwargs["position_ids"] = position_ids
        with self._recording():
            self.decoder(**kwargs)
            return self.calls[0][0], [call[1:] for call in self.calls]

    @turned
    def run(self, hidden: Tensor, calls: list, first: int, last: int, drop: Tensor | None = None) -> Tensor:
        """Returns the state [batch, tokens, hidden] after blocks first..last-1.

        Args:
            hidden: state at depth `first`.
            calls: block arguments from `start`.
            drop: [blocks, batch] True where a row skips a block (layer dropout), or None.
        """
        for index, (block, (args, kwargs)) in list(enumerate(zip(self.blocks, calls)))[first:last]:
            out = block(hidden, *args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            hidden = out if drop is None else torch.where(drop[index][:, None, None], hidden, out)
        return hidden

    def runner(self) -> Callable:
        """Returns `run` for decoding, without layer dropout: the faster way where that gives the same bits, as long as
        nobody changes the blocks."""
        try:
            return straight(self.blocks) if self.straightens else self.run
        except UNFIT:
            return self.run

    def fill(self, hidden: Tensor, calls: list, first: int, last: int, cache: KV, fitted=None) -> None:
        """Writes the K/V of skipped blocks first..last-1 by projecting the exit state with each block's own norm and
        W_K, W_V (CALM, Schuster et al. 2022, section 3.2: the state is carried, not the projected K/V), or as `fitted`.

        Args:
            hidden: state [batch, tokens, hidden] that the tokens left with.
            fitted: the exit's `fills.Fill`, or None.
        """
        if first == last:
            return
        if self.packs:
            projected = self.projections.project(hidden, calls, first, last, fitted)
            for index, (keys, values) in enumerate(zip(*projected, strict=True)):
                cache.write(first + index, keys, values)
            return
        self._fill_apart(hidden, calls, first, last, cache)

    @property
    def projections(self) -> PackedFill:
        """The blocks' W_K and W_V in one, where `packs` says that there is such a thing."""
        self.packed = self.packed or PackedFill(self.blocks)
        return self.packed

    def _fill_apart(self, hidden: Tensor, calls: list, first: int, last: int, cache: KV) -> None:
        """Runs each block until its K/V are written; most multiply W_Q before that, for nothing."""
        cache.stop = True
        try:
            for index in range(first, last):
                args, kwargs = calls[index]
                try:
                    self.blocks[index](hidden, *args, **kwargs)
                except Filled:
                    continue
                raise ValueError("a block did not write its K/V through the cache; this architecture is not supported")
        finally:
            cache.stop = False

    @turned
    def logits(self, normed: Tensor, ids: Tensor | None = None) -> Tensor:
        """Returns logits [..., vocabulary], or [..., len(ids)] for these vocabulary entries only.

        Args:
            normed: state after a final norm, [..., hidden].
            ids: vocabulary entries [entries], or None for all.
        """
        if ids is None:
            return self.cap(self.head(normed))
        weight, bias = self.vocabulary(ids)
        bias = None if bias is None else bias.to(normed.dtype)
        return self.cap(nn.functional.linear(normed, weight.to(normed.dtype), bias))

    def logit_of(self, normed: Tensor, ids: Tensor) -> Tensor:
        """Returns one logit per position [N], float32: of entry `ids` [N] for normed states [N, hidden]."""
        weight, bias = self.vocabulary(ids)
        out = (normed.float() * weight.float()).sum(-1)
        return self.cap(out if bias is None else out + bias.float())

    def cap(self, logits: Tensor) -> Tensor:
        """Returns logits after the model's soft cap, if it has one (Gemma 2, section 2)."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def vocabulary(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the LM head's rows [..., hidden] and biases [...] (or None) for vocabulary `ids` [...].

        Raises:
            ValueError: the head is not a plain linear layer (quantized, say).
        """
        head = self.head
        if type(head) is not nn.Linear:
            raise ValueError(
                f"the LM head is a {type(head).__name__}; sampled negatives and shortlists need a plain "
                "linear head: leave it out of quantization, or set loss.negatives and shortlist to null"
            )
        bias = None if head.bias is None else head.bias[ids]
        # On a CPU, twice as fast as indexing.
        return (head.weight.index_select(0, ids) if ids.dim() == 1 else head.weight[ids]), bias

    @property
    def max_context(self) -> int | None:
        """Longest context in tokens, or None where the config names none."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def extends(self) -> bool:
        """Whether positions beyond `max_context` exist at all: rotary ones do, learned ones do not."""
        return getattr(self.config, "rope_parameters", None) is not None

    def window(self, index: int) -> int | None:
        """Attention window of a block in tokens, or None for full attention."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and "sliding" not in kinds[index]:
            return None
        return getattr(self.config, "sliding_window", None)

    def block_shape(self, index: int) -> dict:
        """Returns what one token costs in a block, as plain numbers for `costs.py`.

        They are `weights` multiplied (active experts only), `fill` weights multiplied to fill K/V alone, `attention`
        multiply-adds per token of context, `kv` numbers stored per token, and the `window`.
        """
        key_heads, key_dim, value_dim = self.kv_shapes
        experts = getattr(self.config, "num_experts", None) or getattr(self.config, "num_local_experts", None)
        share = getattr(self.config, "num_experts_per_tok", 0) / experts if experts else 1.0
        return {
            "weights": linear_weights(self.blocks[index], share),
            "fill": self.fill_weights[index],
            "attention": self.config.num_attention_heads * (key_dim + value_dim),
            "kv": key_heads * (key_dim + value_dim),
            "window": self.window(index),
        }

    @contextmanager
    def _recording(self):
        # The list of blocks is swapped, not the blocks' forward: hooks of FSDP or accelerate stay on the real blocks.
        with SWAP:
            self.parent._modules[self.name] = self.stand_ins
            try:
                yield
            finally:
                self.parent._modules[self.name] = self.blocks
                self.calls.clear()

    @torch.no_grad()
    def _probe(self) -> tuple[nn.Module, list[int], tuple[int, int, int]]:
        """Returns the final norm, the weights multiplied to fill each block's K/V, and the shape of a cached token, and
        checks on four tokens that the parts give the model's own logits."""
        self._takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        was_training = self.inner.training
        self.inner.eval()
        try:
            device = self.inner.get_input_embeddings().weight.device
            ids = torch.arange(4, device=device)[None] % self.config.vocab_size
            norm = find_norm(self.decoder, self.blocks, ids)
            expected = self.model(input_ids=ids, use_cache=False).logits
            cache = KV(self.num_layers, 8, 1)
            hidden, calls = self._first_start(ids, cache)
            require_batch_first(type(self.inner).__name__, calls)
            weights = self._probe_fill(hidden, calls, cache)
            final = self.run(hidden, calls, 0, self.num_layers)
            self.straightens = straightens(self.blocks, hidden, calls, final)
            got = self.logits(norm(final))
            if not torch.allclose(
                got.float(), expected.float(), rtol=1e-2, atol=2e-2 * float(expected.float().abs().max())
            ):
                raise ValueError(
                    f"{type(self.inner).__name__}: running its blocks one by one and then its final norm "
                    f"{type(norm).__name__} and LM head does not give its own logits (largest difference "
                    f"{float((got - expected).abs().max()):.3g}); this architecture does something between its blocks "
                    "that is not supported"
                )
            return norm, weights, (cache.keys[0].shape[1], cache.keys[0].shape[3], cache.values[0].shape[3])
        finally:
            self.inner.train(was_training)

    def _first_start(self, ids: Tensor, cache: KV) -> tuple[Tensor, list]:
        # Blocks of a few older families (Bloom, Falcon) return tuples; which kind this is shows at the first try.
        for as_tuple in (False, True):
            for stand_in in self.stand_ins:
                stand_in.as_tuple = as_tuple
            try:
                return self.start(ids, None, None, cache)
            except (IndexError, TypeError, AttributeError, ValueError) as error:
                reason = error
        raise ValueError(
            f"{type(self.inner).__name__}: its blocks are not called as state -> state "
            f"({type(reason).__name__}: {reason}); this architecture is not supported"
        )

    def _probe_fill(self, hidden: Tensor, calls: list, cache: KV) -> list[int]:
        weights = []
        for index, block in enumerate(self.blocks):
            used: list[int] = []
            handles = [
                module.register_forward_hook(lambda m, *_, used=used: used.append(linear_size(m)))
                for module in block.modules()
                if linear_size(module) and not hasattr(module, "base_layer")
            ]
            try:
                self._fill_apart(hidden, calls, index, index + 1, cache)
            finally:
                for handle in handles:
                    handle.remove()
            weights.append(sum(used))
        self.packs = packs(self.blocks, hidden, calls, cache)
        if self.packs:
            weights = [
                block.self_attn.k_proj.weight.numel() + block.self_attn.v_proj.weight.numel() for block in self.blocks
            ]
        return weights

    def refresh(self) -> None:
        """Takes the LM head that the model has now (`resize_token_embeddings` makes a new one), and drops the packed
        projections if a weight has changed since they were made; called once per generation and training step."""
        self.head = find_head(self.inner)
        if self.packed is not None and self.packed.key != PackedFill.stamp(self.blocks):
            self.packed = None
