"""What a model's linear layers read, on text that it writes itself: rounding their weights weighs errors by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from adaptive.kv import KV

ROWS, TOKENS = 8, 128  # of the text


def gram(states: Tensor) -> np.ndarray:
    """Returns the Gram matrix [width, width] of states [.., width]."""
    states = states.detach().float().reshape(-1, states.shape[-1])
    return (states.T @ states).cpu().numpy()


@contextmanager
def watched(*modules: nn.Module) -> Iterator[None]:
    """Gives every linear layer in the modules a `gram`, of what it reads meanwhile."""
    last: list = [None, None]  # layers beside each other read one tensor

    def note(layer: nn.Module, args: tuple) -> None:
        if args[0] is not last[0]:
            last[:] = args[0], gram(args[0])
        layer.gram = last[1]

    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Text:
    """States of text that the model writes when it is told nothing, taken from block to block.

    Args:
        model: the `EarlyExitModel`.

    Attributes:
        state: [rows, tokens, hidden] at `depth`.
        at: states at the exits' depths, once they were reached.
    """

    def __init__(self, model):
        config, view = model.view.config, model.view
        start = next((token for token in (config.bos_token_id, config.eos_token_id) if isinstance(token, int)), 0)
        count = min(TOKENS, view.max_context or TOKENS)
        ids, kv = torch.full((ROWS, 1), start, device=model.device), KV(view.num_layers, count, ROWS)
        generator = torch.Generator(model.device).manual_seed(0)
        while ids.shape[1] < count:
            state, calls = view.start(ids[:, -1:], None, None, kv)
            state = view.run(state, calls, 0, view.num_layers)
            kv.column += 1
            chances = view.logits(view.norm(state[:, -1])).float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
        self.state, self.calls = view.start(ids, None, None, None)
        self.depths, self.at, self.depth = set(model.depths), {}, 0

    def through(self, block: nn.Module) -> None:
        """Runs the next block, or a copy of it, and notes what its linear layers read."""
        args, kwargs = self.calls[self.depth]
        with watched(block):
            out = block(self.state, *args, **kwargs)
        self.state, self.depth = out[0] if isinstance(out, tuple) else out, self.depth + 1
        if self.depth in self.depths:
            self.at[self.depth] = self.state
