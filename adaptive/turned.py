"""Linear layers on a few states, the faster way round.

A step of decoding multiplies a few states X by a large W. Which way round is faster depends on the CPU. Where torch
says AVX2, X W^T is no faster on two threads than on one; W X^T is, and shares one reading of W; on one thread, too, it
is faster for 2 to 5. For a single state W has to be cut into pieces, as a product with a vector is left to one thread.
Where it says AVX512, X W^T is the faster one throughout. The products of SmolLM2-135M's blocks, float32 (MKL), in ms
for 1 to 8 states on one thread, and on two:
    AVX2, an EPYC    X W^T    41  68  78  77  82  79  90  82      41  62  73  70  60  58  63  63
                     W X^T    44  48  59  51  61  74  87  80      24  30  36  30  36  41  49  46
    AVX512, a Xeon   X W^T    43  46  50  75  84  81   -  95      22  25  27  37  38  39   -  40
                     W X^T    91  79  87  89 102  87   -  89      51  53  55  55  55  54   -  53
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
    if states.dtype != torch.float32 or not pays(states.device) or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return False
    return (1 if torch.get_num_threads() > 1 else 2) <= states.numel() // states.shape[-1] <= MOST


def pays(device: torch.device) -> bool:
    """Returns whether a few states take hardly longer than one on this device, as gradients are not needed there."""
    return device.type == "cpu" and not torch.is_grad_enabled()


def turned(method):
    """Turns the linear layers in a method whose first argument is states [..., hidden], if these are few."""

    @wraps(method)
    def wrapped(self, states: Tensor, *args, **kwargs):
        """As the method."""
        if not few(states):
            return method(self, states, *args, **kwargs)
        with _Turned():
            return method(self, states, *args, **kwargs)

    return wrapped
