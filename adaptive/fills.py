"""What stands in for the K/V of blocks that a token skips: a linear map of the state that it left with, fitted to what
the blocks would have made of it had they run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adaptive.kv import PackedFill

TRUST = 400  # states that the blocks' own projections are worth against them
# What a state weighs: its gate's score, sharpened, as only what leaves needs a map, and that is what a gate is sure of.
# And a little, lest the map forget the others. Behind block 16 of 30 the K/V of what leaves then have a quarter less
# error (0.20 instead of 0.27 of their variance).
SHARPNESS, FLOOR = 16, 0.03
ROWS = 8  # in one pass


class Fill(nn.Module):
    """State at an exit -> keys (before their norm and rotation) and values of every deeper block, in one product.

    Starts as the blocks' own norms and W_K, W_V on that state (CALM, Schuster et al. 2022, section 3.2). Those expect
    the state that enters each block; far from it they give K/V no better than a constant, and the tokens that attend to
    these later go wrong. `fit` puts the least-squares map in their place, at the same cost.

    Args:
        pack: the blocks' own projections.
        depth: of the exit.

    Attributes:
        weight: [blocks, 2, kv size, hidden]; multiplies the state divided by its root mean square.
        bias: [blocks, 2, kv size].
    """

    def __init__(self, pack: PackedFill, depth: int):
        super().__init__()
        self.depth = depth
        weight, bias = pack.of(depth, len(pack.weight))
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", weight.new_zeros(weight.shape[:3]) if bias is None else bias.detach().clone())

    def of(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Returns weights [blocks, 2, kv size, hidden] and biases [blocks, 2, kv size] of blocks first..last-1."""
        blocks = slice(first - self.depth, last - self.depth)
        return self.weight[blocks], self.bias[blocks]

    @torch.no_grad()
    def fit(self, moments: Moments, pack: PackedFill) -> None:
        """Sets the map that minimises the weighted mean of |W x + b - y|^2, plus r |W - W_0|^2: W_0 are the blocks' own
        projections, and b takes the states' mean to that of the K/V (ridge regression, Hoerl and Kennard 1970).

        Args:
            moments: of the states x at the exit's depth and the K/V y wanted of all deeper blocks.
            pack: the blocks' own projections.
        """
        own = pack.of(self.depth, len(pack.weight))[0].flatten(0, 2).double()
        cov, cross, x, y = moments.centered()
        ridge = TRUST / moments.count * cov.diagonal().mean().clamp_min(1e-12)
        system = cov + ridge * torch.eye(len(cov), device=cov.device, dtype=cov.dtype)
        weight = torch.linalg.solve(system, cross + ridge * own.T).T
        self.weight.copy_(weight.view_as(self.weight))
        self.bias.copy_((y - weight @ x).view_as(self.bias))


class Moments:
    """Weighted sums over states x [N, hidden] and what is wanted of them, y [N, entries], that a linear map is fitted
    from."""

    def __init__(self):
        self.count = 0
        self.sums: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Adds some states, what is wanted of them, and what each of them weighs [N]."""
        heavy = x * weight[:, None]
        sums = (heavy.T @ x, heavy.T @ y, heavy.sum(0), (y * weight[:, None]).sum(0), weight.sum())
        new = tuple(part.double() for part in sums)
        self.count += len(x)
        self.sums = tuple(map(torch.add, self.sums, new)) if self.sums else new

    def centered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns covariance [hidden, hidden] and cross-covariance [hidden, entries], and the means of x and y."""
        square, cross, x, y = (part / self.sums[-1] for part in self.sums[:-1])
        return square - torch.outer(x, x), cross - torch.outer(x, y), x, y


@torch.no_grad()
def fit_fills(model, rows: dict[str, Tensor], max_tokens: int) -> None:
    """Fits every exit's `Fill` to what the backbone makes of the first training rows, above all of what would leave.

    Prompts are left out: they never leave, and those of a chat begin alike, in states that are easy to map.

    Args:
        model: the `EarlyExitModel`; what its gates say is final.
        rows: `input_ids`, `attention_mask`, `labels` [rows, tokens].
        max_tokens: labelled tokens after which no further row is read.
    """
    view, exits = model.view, model.exits
    fills = {fill.depth: fill for fill in exits.fills if fill is not None}
    count = min(int((rows["labels"] != -100).sum()), max_tokens)
    if not fills or not view.packs or not count:
        return
    view.refresh()
    pack, moments = view.projections, {depth: Moments() for depth in fills}
    gates = {depth: gate for depth, gate in zip(model.depths, exits.gates, strict=True) if depth in fills}
    with tqdm(total=count, desc="fitting K/V", unit="token", leave=False) as bar:
        for some in torch.arange(len(rows["labels"])).split(ROWS):
            batch = (rows[name][some].to(view.device) for name in ("input_ids", "attention_mask", "labels"))
            states = _states(view, *batch, min(fills))
            units = {depth: pack.unit(state).float() for depth, state in states.items()}
            wanted = [_linear(pack, depth, unit) for depth, unit in units.items()]
            for depth, sums in moments.items():
                weight = _weight(gates[depth], states[depth])
                sums.add(units[depth], torch.cat(wanted[depth - min(fills) :], dim=1), weight)
            bar.update(len(units[min(fills)]))
            if sums.count >= count:
                break
    for depth, fill in fills.items():
        fill.fit(moments[depth], pack)


def _states(view, ids: Tensor, mask: Tensor, labels: Tensor, first: int) -> dict[int, Tensor]:
    """Returns the states [N, hidden] of labelled tokens that enter the blocks from `first` on, by depth."""
    keep, positions = labels != -100, (mask.cumsum(-1) - 1).clamp_min(0)
    hidden, calls = view.start(ids, mask, positions, None)
    out, depth = {}, 0
    for block in range(first, view.num_layers):
        hidden, depth = view.run(hidden, calls, depth, block), block
        out[block] = hidden[keep]
    return out


def _weight(gate: nn.Module, states: Tensor) -> Tensor:
    """Returns float32 [N], what states [N, hidden] weigh; all the same where scores need more than a state."""
    return (gate.score(states).float() if gate.learned else states.new_ones(len(states)).float()) ** SHARPNESS + FLOOR


def _linear(pack: PackedFill, block: int, unit: Tensor) -> Tensor:
    weight, bias = pack.of(block, block + 1)
    return nn.functional.linear(unit, weight.flatten(0, 2).float(), None if bias is None else bias.flatten().float())
