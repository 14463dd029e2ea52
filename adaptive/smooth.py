"""Weights made ready for 4 bits: input channels that carry much are scaled up, and what produces them down.

With s > 0 per input channel, W x = (W diag(s)) (x / s). Rounding then errs by about what it did before, but on channel
i that is multiplied by x_i / s_i: large inputs gain, others lose a little (AWQ, Lin et al. 2023, section 3.2).
s = mean(|x|)^a, where a is the one of `POWERS` that leaves the rounded product nearest to the exact one (eq. 4 and 5
there). Nothing is divided at run time: s goes into the norm before the product, or into the rows of the one before it.
Inputs are those of a text that the model writes itself. The LM head is left alone: it gains nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.kv import KV
from adaptive.quantize import quantize, restore
from adaptive.recipes import MLP, Block, Linear, Norm, Shape

BITS = 4  # the weights of other folders stay as they are
POWERS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)
TEXTS, LENGTH, SEED = 8, 48, 0  # of what the model writes: texts, tokens of each (half as many help less), seed
ROWS = 512  # of a weight: so many tell which power is best
ACTS = {"silu": F.silu, "gelu": partial(F.gelu, approximate="tanh")}


class Smooth:
    """Scales for the products of a model's blocks and heads, found when they are first asked for.

    What goes in is read off the model, which stays as it is; what comes out are recipes of the same functions.

    Args:
        view: the backbone.
        shape: of its blocks.
    """

    def __init__(self, view, shape: Shape):
        self.shape = shape
        self.states, self.contexts = written(view)
        self.found: dict[int, tuple[np.ndarray, ...]] = {}

    def block(self, block: Block, index: int) -> Block:
        """Returns block `index` of the backbone with scaled weights; its values, and so its V, are scaled as well."""
        if index not in self.found:
            normed = rms(self.states[index], block.norm)
            enters, value = best(block.qkv.weight, normed), self._value(block, index)
            added = linear(self.contexts[index], block.out)
            added = added if block.after is None else rms(added, block.after)
            self.found[index] = (enters, value, *mlp_scales(block.mlp, self.states[index] + added))
        enters, value, *both = self.found[index]
        qkv = divided(multiplied(block.qkv, enters), value)
        return replace(self.reading(block, index), norm=lowered(block.norm, enters), qkv=qkv,
                       mlp=scaled_mlp(block.mlp, *both))  # fmt: skip

    def reading(self, block: Block, index: int) -> Block:
        """Returns a block, not scaled itself, that reads the V of the backbone's block `index`."""
        heads = self.found[index][1].reshape(self.shape.kv_heads, 1, -1)
        wide = np.repeat(heads, self.shape.heads // self.shape.kv_heads, axis=1).ravel()
        return replace(block, out=multiplied(block.out, wide))

    def fill(self, fitted: Linear, first: int) -> Linear:
        """Returns the map to all keys and then all values of the blocks from `first` on, as scaled blocks read them."""
        return divided(fitted, np.concatenate([self.found[index][1] for index in range(first, len(self.found))]))

    def mlps(self, mlps: list[MLP], depth: int, adapter: tuple[Linear, Linear] | None) -> list[MLP]:
        """Returns the residual MLPs of a head at a depth, behind its adapter if it has one, with scaled weights."""
        state, out = self.states[depth], []
        if mlps and adapter is not None:
            state = state + linear(linear(state, adapter[0]), adapter[1])
        for mlp in mlps:
            out.append(scaled_mlp(mlp, *mlp_scales(mlp, state)))
            state = state + linear(inside(mlp, rms(state, mlp.norm)), mlp.down)
        return out

    def _value(self, block: Block, index: int) -> np.ndarray:
        """Returns scales [kv heads * head dim]: query heads that share a head's values share its scales."""
        weight, context = block.out.weight, self.contexts[index]
        size = context.abs().mean(0).view(self.shape.kv_heads, -1, self.shape.head_dim)
        shared = size.mean(1, keepdim=True).expand_as(size).reshape(-1)
        found = best(weight, context, shared).reshape(size.shape)
        return found[:, 0].ravel()


@torch.no_grad()
def written(view) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what the model's products read while it writes `TEXTS` texts from nothing.

    Returns:
        states [tokens, hidden] before each block and behind the last one, and what each block's heads hand to its
        output projection [tokens, heads * head dim].
    """
    config, kv = view.config, KV(view.num_layers, LENGTH, TEXTS)
    known = [getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")]
    start = next((token for token in known if isinstance(token, int)), 0)
    generator = torch.Generator(view.device).manual_seed(SEED)
    states, contexts = ([[] for _ in range(view.num_layers + extra)] for extra in (1, 0))

    def keep(to: list, _, args: tuple) -> None:
        to.append(plain(args[0]))

    hooks = [block.self_attn.o_proj.register_forward_pre_hook(partial(keep, to))
             for block, to in zip(view.blocks, contexts, strict=True)]  # fmt: skip
    try:
        ids = torch.full((TEXTS, 1), start, device=view.device)
        for _ in range(LENGTH):
            hidden, calls = view.start(ids, None, None, kv)
            for index, kept in enumerate(states):
                kept.append(plain(hidden))
                if index < view.num_layers:
                    hidden = view.run(hidden, calls, index, index + 1)
            kv.column += 1
            scores = view.logits(view.norm(hidden[:, -1])).float()
            ids = torch.multinomial(scores.softmax(-1), 1, generator=generator)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in states], [torch.cat(parts) for parts in contexts]


def plain(hidden: Tensor) -> Tensor:
    """Returns a state [.., width] as [tokens, width], float32, on the CPU."""
    return hidden.detach().flatten(0, -2).float().cpu()


def best(weight: np.ndarray, x: Tensor, size: Tensor | None = None) -> np.ndarray:
    """Returns scales [in] for the input channels of a weight [out, in].

    Args:
        weight: to be rounded.
        x: inputs [tokens, in].
        size: of each input channel [in]; the mean of |x| if None.
    """
    rows = np.random.default_rng(SEED).permutation(len(weight))[:ROWS]
    exact, found = torch.from_numpy(weight[np.sort(rows)]), None
    size = x.abs().mean(0) if size is None else size
    for power in POWERS:
        scales = size.clamp_min(1e-4) ** power
        scales = scales / (scales.max() * scales.min()).sqrt()
        scaled = (exact * scales).numpy()
        rounded = torch.from_numpy(restore(*quantize(scaled, BITS), BITS, scaled.shape[1]))
        error = float((x @ (rounded / scales - exact).T).square().sum())
        if found is None or error < found[0]:
            found = (error, scales)
    return found[1].numpy()


def mlp_scales(mlp: MLP, state: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns scales for what an MLP reads [hidden], and for what its second product reads [intermediate], from states
    [tokens, hidden] before its norm."""
    normed = rms(state, mlp.norm)
    return best(mlp.gate_up.weight, normed), best(mlp.down.weight, inside(mlp, normed))


def scaled_mlp(mlp: MLP, enters: np.ndarray, middle: np.ndarray) -> MLP:
    """Returns an MLP with both products scaled; what comes before the second one is gate * up, so that up shrinks."""
    return replace(mlp, norm=lowered(mlp.norm, enters), gate_up=divided(multiplied(mlp.gate_up, enters), middle),
                   down=multiplied(mlp.down, middle))  # fmt: skip


def inside(mlp: MLP, normed: Tensor) -> Tensor:
    """Returns what an MLP's second product reads [tokens, intermediate] (Shazeer 2020, eq. 6)."""
    gate, up = linear(normed, mlp.gate_up).chunk(2, -1)
    return ACTS[mlp.act](gate) * up


def multiplied(layer: Linear, scales: np.ndarray) -> Linear:
    """Returns a layer whose input channels [in] are scaled up."""
    return Linear(layer.weight * scales, layer.bias)


def divided(layer: Linear, scales: np.ndarray) -> Linear:
    """Returns a layer whose last outputs, as many as there are scales, are scaled down."""
    by = np.concatenate([np.ones(len(layer.weight) - len(scales), np.float32), scales])
    return Linear(layer.weight / by[:, None], None if layer.bias is None else layer.bias / by)


def lowered(norm: Norm, scales: np.ndarray) -> Norm:
    """Returns a norm whose output [hidden] is scaled down."""
    return Norm(norm.weight / scales, norm.eps)


def rms(state: Tensor, norm: Norm) -> Tensor:
    """Returns normed states (Zhang & Sennrich 2019, eq. 4)."""
    return F.rms_norm(state, state.shape[-1:], torch.from_numpy(norm.weight), norm.eps)


def linear(x: Tensor, layer: Linear) -> Tensor:
    """Returns x W^T + b."""
    return F.linear(x, torch.from_numpy(layer.weight), None if layer.bias is None else torch.from_numpy(layer.bias))
