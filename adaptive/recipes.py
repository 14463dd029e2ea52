"""What the blocks and heads of known families compute, read off their modules as plain numbers.

The exported graphs are built from these. A family is known when its tests show that the graphs give its own logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adaptive.anatomy import plain_copy
from adaptive.exits import GatedMLP

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}


@dataclass
class Norm:
    """RMS norm: state / rms(state) * weight, with weight [hidden] as it is multiplied."""

    weight: np.ndarray
    eps: float


@dataclass
class Linear:
    """weight [out, in], bias [out] or None."""

    weight: np.ndarray
    bias: np.ndarray | None = None

    def halves(self) -> tuple[Linear, Linear]:
        """Returns the layers that make the first and the second half of what comes out."""
        weights, middle = self.weight, len(self.weight) // 2
        biases = (None, None) if self.bias is None else (self.bias[:middle], self.bias[middle:])
        return Linear(weights[:middle], biases[0]), Linear(weights[middle:], biases[1])


@dataclass
class MLP:
    """Residual gated MLP: state + after(down(act(gate) * up)) of the normed state; `gate_up` holds both, gate first."""

    norm: Norm
    gate_up: Linear
    down: Linear
    act: str
    after: Norm | None = None


@dataclass
class Block:
    """A decoder block.

    Attributes:
        norm: before attention.
        qkv: queries, keys and values of all heads, in this order.
        q_norm, k_norm: per head, before the rotary step; None where there are none.
        out: from the heads back to the state.
        after: norm of what attention adds, or None.
        mlp: second half of the block.
        window: tokens attended to, or None for all.
        rope: which rotary table turns queries and keys.
    """

    norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    after: Norm | None
    mlp: MLP
    window: int | None
    rope: int


@dataclass
class Shape:
    """What all blocks share: heads, the width of one and how much of it is turned, the factor on their scores, the soft
    cap of these (0: none)."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    turned: int
    scale: float
    softcap: float
    act: str

    @property
    def rotary(self) -> dict[str, int]:
        """What the rotary operator is told of a head; 0 where all of it is turned."""
        return {"rotary_embedding_dim": self.turned if self.turned < self.head_dim else 0}


def require_known(config) -> None:
    """Refuses a backbone that the graphs do not know, naming everything that is missing.

    Raises:
        ValueError: with one line for each reason.
    """
    problems = []
    if config.model_type not in FAMILIES:
        problems.append(f"family `{config.model_type}` has no exported form; there is one for {', '.join(FAMILIES)}")
    else:
        act = activation(config)
        if act not in ACTIVATIONS:
            problems.append(f"activation `{act}` has no exported form; there is one for {', '.join(ACTIVATIONS)}")
        for rope in _rope_parameters(config).values():
            if rope["rope_type"] not in ("default", "linear", "llama3"):
                problems.append(
                    f"rotary type `{rope['rope_type']}` depends on the length of the text, which the exported tables "
                    "do not; there are default, linear and llama3"
                )
        if getattr(config, "use_bidirectional_attention", None):
            problems.append("attention in both directions has no exported form")
    if problems:
        raise ValueError("export: " + "; ".join(problems))


def activation(config) -> str:
    """Returns the name of the MLP's activation."""
    return getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or "silu"


def array(tensor: Tensor | None) -> np.ndarray | None:
    """Returns a float32 copy."""
    return None if tensor is None else tensor.detach().float().cpu().numpy()


def shape(config, block: nn.Module, turned: int) -> Shape:
    """Returns what all blocks share; `turned` numbers of a head are."""
    heads = config.num_attention_heads
    attention = block.self_attn
    return Shape(
        config.hidden_size,
        heads,
        config.num_key_value_heads,
        attention.head_dim,
        turned,
        float(attention.scaling),
        float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        ACTIVATIONS[activation(config)],
    )


def norm(module: nn.Module) -> Norm:
    """Returns an RMS norm; what it multiplies by is read off its output, as some families store it less one."""
    eps = getattr(module, "variance_epsilon", None) or module.eps
    copied = {name: value.detach().float() for name, value in module.named_parameters()}
    ones = torch.ones_like(next(iter(copied.values())))
    weight = torch.func.functional_call(module, copied, (ones,)) * (1 + eps) ** 0.5
    return Norm(array(weight), float(eps))


def linear(*modules: nn.Module) -> Linear:
    """Returns several linear layers of one input as one."""
    weight = np.concatenate([array(module.weight) for module in modules])
    biases = [module.bias for module in modules]
    if all(bias is None for bias in biases):
        return Linear(weight)
    filled = [array(b) if b is not None else np.zeros(len(m.weight), np.float32) for b, m in zip(biases, modules)]
    return Linear(weight, np.concatenate(filled))


def block(module: nn.Module, shape: Shape, window: int | None, rope: int) -> Block:
    """Returns a block; adapters are merged into a copy first."""
    module = plain_copy(module)
    attention, gemma = module.self_attn, hasattr(module, "pre_feedforward_layernorm")
    packed = getattr(attention, "qkv_proj", None)
    qkv = linear(packed) if packed is not None else linear(attention.q_proj, attention.k_proj, attention.v_proj)
    parts, mlp = [getattr(module.mlp, "gate_up_proj", None)], module.mlp
    parts = parts if parts[0] is not None else [mlp.gate_proj, mlp.up_proj]
    return Block(
        norm(module.input_layernorm),
        qkv,
        norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        linear(attention.o_proj),
        norm(module.post_attention_layernorm) if gemma else None,
        MLP(
            norm(module.pre_feedforward_layernorm if gemma else module.post_attention_layernorm),
            linear(*parts),
            linear(mlp.down_proj),
            shape.act,
            norm(module.post_feedforward_layernorm) if gemma else None,
        ),
        window,
        rope,
    )


def gated_mlp(module: GatedMLP, act: str) -> MLP:
    """Returns one MLP of an mlp head."""
    return MLP(norm(module.norm), linear(module.gate, module.up), linear(module.down), act)


def ropes(config, decoder: nn.Module) -> tuple[list[dict], list[int]]:
    """Returns the rotary tables, each {"inverse": inverse frequencies, "factor": of cos and sin}, and which of them
    each block reads."""
    module = decoder.rotary_emb
    kinds = list(_rope_parameters(config))
    tables = []
    for kind in kinds:
        prefix = f"{kind}_" if kind else ""
        inverse = getattr(module, f"{prefix}inv_freq").float().cpu().tolist()
        tables.append({"inverse": inverse, "factor": float(getattr(module, f"{prefix}attention_scaling"))})
    if kinds == [""]:
        return tables, [0] * config.num_hidden_layers
    return tables, [kinds.index(kind) for kind in config.layer_types]


def _rope_parameters(config) -> dict[str, dict]:
    """Rotary parameters by kind of layer; the kind is "" where all layers share them."""
    parameters = config.rope_parameters
    return {"": parameters} if "rope_type" in parameters else dict(sorted(parameters.items()))
