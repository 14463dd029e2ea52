"""Linear layers on a few states, the faster way round.

A step of decoding multiplies a few states X by a large W. On a CPU, X W^T is then no faster on two threads than on one;
W X^T is, and shares one reading of W. SmolLM2-135M, float32, two threads: the blocks take 4 states in
33 ms instead of 63, 8 in 43 instead of 66; the LM head takes 4 in 8 instead of 20. One thread alone gains nothing.
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MOST = 8  # states at once; from about 16 on, the usual way is as fast
PLAIN = (Tensor, nn.Parameter)


class _Turned(TorchFunctionMode):
    """Within it, `linear` is turned. A mode, since the layers belong to the user's model, which is not changed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Other types of weights (quantized ones) know no other product.
        if func is nn.functional.linear and not kwargs and type(args[1]) in PLAIN and few(args[0]):
            return flipped(*args)
        return func(*args, **(kwargs or {}))


def flipped(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns what `nn.functional.linear` does, as W X^T."""
    out = torch.mm(weight, states.reshape(-1, states.shape[-1]).t()).t().contiguous()
    return (out if bias is None else out + bias).reshape(*states.shape[:-1], -1)


def few(states: Tensor) -> bool:
    """Returns whether these states [..., hidden] are so few that turning pays, where it does at all."""
    return states.dtype == torch.float32 and pays(states.device) and 1 < states.numel() // states.shape[-1] <= MOST


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
