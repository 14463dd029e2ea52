"""Measuring: interleaved rounds and their spread, and memory of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm


def interleaved(runs: dict[str, Callable], rounds: int, title: str) -> dict[str, list]:
    """Returns what each of `runs` returned, once per round; every round in another order, so that none always runs
    behind the same one."""
    names, found, generator = list(runs), {name: [] for name in runs}, np.random.default_rng(0)
    for _ in tqdm(range(rounds), desc=title):
        for name in generator.permutation(names):
            found[name].append(runs[name]())
    return found


def spread(values: Sequence[float], to: Sequence[float] | None = None) -> dict[str, float]:
    """Returns median, smallest and largest of `values`, or of their ratios to `to`, round by round."""
    ratios = [float(f"{a / b:.5g}") for a, b in zip(values, to or [1.0] * len(values), strict=True)]
    return {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)}


class Allocations(TorchDispatchMode):
    """Follows the tensors that operations return, not what kernels use inside: `largest`, numbers in the largest one;
    `alive`, bytes of those that are still there; `peak`, the most that this ever was."""

    largest = alive = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Views, and what is changed in place, share the storage of something given.
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                self.largest = max(self.largest, tensor.numel())
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return out

    def _count(self, num_bytes: int) -> None:
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)
