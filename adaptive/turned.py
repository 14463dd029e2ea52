"""Linear layers on a few states, the faster way round.

A step of decoding multiplies a few states X by a large W. On a CPU, X W^T is then no faster on two threads than on one;
W X^T is, and shares one reading of W. For a single state it has to be cut into pieces of W, as a product with a vector
is left to one thread. SmolLM2-135M, float32, two threads: the blocks take 1 state in 39 ms instead of 59, 4 in 49
instead of 112, 8 in 75 instead of 95; the LM head takes 1 in 8 instead of 16. One thread alone gains nothing.
"""

from __future__ import annotations

import math
from functools import wraps

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MOST = 8  # states at once; from about 16 on, the usual way is as fast
PARTS = 16  # at most, that a single state's product is cut into, for threads to share
PLAIN = (Tensor, nn.Parameter)


class _Turned(TorchFunctionMode):
    """Within it, `linear` is turned. A mode, since the layers belong to the user's model, which is not changed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Other types of weights (quantized ones) know no other product.
        if func is nn.functional.linear and not kwargs and type(args[1]) in PLAIN and few(args[0]):
            return flipped(*args)
        return func(*args, **(kwargs or {}))


def flipped(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns what `nn.functional.linear` does, as W X^T; for a single state as a batch of pieces of W."""
    flat = states.reshape(-1, states.shape[-1])
    if len(flat) == 1 and weight.is_contiguous():
        parts = math.gcd(len(weight), PARTS)
        out = torch.bmm(weight.view(parts, -1, weight.shape[1]), flat.t().expand(parts, -1, -1)).view(1, -1)
    else:
        out = torch.mm(weight, flat.t()).t().contiguous()
    return (out if bias is None else out + bias).reshape(*states.shape[:-1], -1)


def few(states: Tensor) -> bool:
    """Returns whether these states [..., hidden] are so few that turning pays, where it does at all."""
    return states.dtype == torch.float32 and pays(states.device) and 1 <= states.numel() // states.shape[-1] <= MOST


def pays(device: torch.device) -> bool:
    """Returns whether a few states take hardly longer than one on this device: gradients, which are not needed there,
    are off, and several threads share the work."""
    return device.type == "cpu" and torch.get_num_threads() > 1 and not torch.is_grad_enabled()


def turned(method):
    """Turns the linear layers in a method whose first argument is states [..., hidden], if these are few."""

    @wraps(method)
    def wrapped(self, states: Tensor, *args, **kwargs):
        if not few(states):
            return method(self, states, *args, **kwargs)
        with _Turned():
            return method(self, states, *args, **kwargs)

    return wrapped
