"""Blocks of the Llama family without their modules: the same products in the same order, bit for bit.

A step of decoding is two thousand small operations, and calling the thirteen modules of every block takes longer than
many of their products. A model's own blocks stay what is true: blocks that do not give the same bits this way, that
are hooked, adapted or quantized, are run as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaptive.turned import PLAIN, few, flipped

UNFIT = (AttributeError, LookupError, TypeError, ValueError, RuntimeError)


def straight(blocks: nn.ModuleList) -> Callable:
    """Returns what runs the blocks as they are now: a function as `Backbone.run` without layer dropout.

    Raises:
        AttributeError, LookupError, TypeError: they are not made of the parts that are known here, or somebody hooked,
            adapted, quantized or compiled one.
    """
    if _has_any_global_hook():
        raise TypeError("hooks on all modules")
    parts = [_Block(block) for block in blocks]

    def run(hidden: Tensor, calls: list, first: int, last: int) -> Tensor:
        """As `Backbone.run`."""
        linear, known, angles = flipped if few(hidden) else nn.functional.linear, None, ()
        where, flat = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1])
        for part, (_, kwargs) in zip(parts[first:last], calls[first:last], strict=True):
            if kwargs["position_embeddings"] is not known:  # most blocks are called with the very same
                known = kwargs["position_embeddings"]
                angles = _angles(*known)
            flat = part(flat, where, linear, angles, **kwargs)
        return flat.view(hidden.shape)

    return run


def straightens(blocks: nn.ModuleList, hidden: Tensor, calls: list, wanted: Tensor) -> bool:
    """Returns whether the blocks, run straight from the state `hidden`, give exactly the state that is wanted."""
    try:
        return torch.equal(straight(blocks)(hidden, calls, 0, len(blocks)), wanted)
    except UNFIT:
        return False


class _Block:
    def __init__(self, block: nn.Module):
        if not all(map(_bare, block.modules())):
            raise TypeError("a block that is trained, hooked or changed")
        attention, mlp = block.self_attn, block.mlp
        self.attention, self.head_dim = attention, attention.head_dim
        self.settings = {"dropout": 0.0, "scaling": attention.scaling}
        if hasattr(attention, "sliding_window"):
            self.settings["sliding_window"] = attention.sliding_window
        self.attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        self.norms = _gain(block, "input_layernorm"), _gain(block, "post_attention_layernorm")
        self.query, self.key, self.value = (_weights(attention, name) for name in ("q_proj", "k_proj", "v_proj"))
        self.out = _weights(attention, "o_proj")
        self.head_norms = [_gain(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        self.gate, self.up, self.down = (_weights(mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
        self.act, self.layer = mlp.act_fn, attention.layer_idx

    def __call__(
        self,
        flat: Tensor,
        where: tuple[int, int],
        linear: Callable,
        angles: tuple,
        attention_mask,
        position_embeddings,  # are in `angles`
        past_key_values,
        **kwargs,
    ) -> Tensor:
        state = _normed(flat, *self.norms[0])
        query, key, value = (
            linear(state, *part).view(*where, -1, self.head_dim) for part in (self.query, self.key, self.value)
        )
        if self.head_norms:
            query, key = _normed(query, *self.head_norms[0]), _normed(key, *self.head_norms[1])
        turned = _turn(torch.cat([query, key], dim=2).transpose(1, 2), *angles)
        query, key = turned.split([query.shape[2], key.shape[2]], dim=1)
        key, value = past_key_values.update(key, value.transpose(1, 2), self.layer)
        mixed, _ = self.attend(self.attention, query, key, value, attention_mask, **self.settings, **kwargs)
        flat = flat + linear(mixed.reshape(len(flat), -1), *self.out)
        state = _normed(flat, *self.norms[1])
        return flat + linear(self.act(linear(state, *self.gate)) * linear(state, *self.up), *self.down)


def _bare(module: nn.Module) -> bool:
    """Returns whether calling a module does nothing but what its class says, without dropout."""
    changes = (module._forward_hooks, module._forward_pre_hooks, module._compiled_call_impl, module.training)
    return not any(changes) and "forward" not in vars(module)


# Parts are looked up where a module keeps its own: wrappers (peft's, say) hand on the attributes of what they wrap, and
# do not always call it.
def _weights(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    layer = module._modules[name]
    if type(layer) is not nn.Linear or type(layer.weight) not in PLAIN:
        raise TypeError(f"a linear layer of a type of its own, {type(layer).__name__}")
    return layer.weight, layer.bias


def _gain(module: nn.Module, name: str) -> tuple[Tensor, float]:
    norm = module._modules[name]
    return norm._parameters["weight"], norm.variance_epsilon


def _normed(state: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * nn.functional.rms_norm(state.float(), state.shape[-1:], None, eps).to(state.dtype)


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what a head's state, and the same with its halves swapped, are multiplied by in the rotary step."""
    half = sin.shape[-1] // 2
    return cos.unsqueeze(1), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(1)


def _turn(state: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return state * cos + state.roll(state.shape[-1] // 2, -1) * sin
