"""What exits know before their first step: everything about them that a closed form gives from training rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adaptive.exits import ADAPTED, Head
from adaptive.objective import full_states
from adaptive.screen import low_rank

STATES = 16384  # labelled positions that linear heads and a screen are fitted to
RIDGE = 1e-3  # of the states' mean square


@torch.no_grad()
def fit_exits(model, rows: dict[str, Tensor]) -> None:
    """Sets what needs no steps, from training rows: linear heads, and what exits with a shortlist may say: fixed lists
    by how often an entry is wanted, a screen from the full model's states.

    Args:
        model: the `EarlyExitModel`.
        rows: `input_ids`, `attention_mask`, `labels` [rows, tokens], with `states.with_states` or without.
    """
    view, exits, labels = model.view, model.exits, rows["labels"]
    exits.choose_shortlists(torch.bincount(labels[labels >= 0], minlength=view.vocab_size))
    linear = [index for index, head in enumerate(exits.heads) if head.kind in ADAPTED]
    if not linear and exits.screen is None:
        return
    found, count = [], 0
    with tqdm(total=STATES, desc="fitting heads", unit="token", leave=False) as bar:
        for states in _labelled(model, rows):
            found.append(states if linear else states[:, -1:].clone())  # a screen wants the last ones only
            count += len(states)
            bar.update(len(states))
            if count >= STATES:
                break
    if not count:
        return
    states = torch.cat(found)
    if exits.screen is not None:
        exits.screen.fit(view, states[:, -1])
    for index in linear:
        fit_linear(exits.heads[index], view.norm, states[:, index], states[:, -1])


def _labelled(model, rows: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yields the states [n, exits + 1, hidden] at one row's labelled positions after the other: at every exit, and the
    normed one at full depth."""
    for row, labels in enumerate(rows["labels"]):
        if "states" in rows:
            states = rows["states"][row]
        else:
            inputs = (rows[name][row : row + 1].to(model.view.device) for name in ("input_ids", "attention_mask"))
            at_exits, final, _ = full_states(model.view, *inputs, model.depths)
            states = torch.stack([*at_exits, final], 2)[0]
        yield states[:-1][(labels[1:] != -100).to(states.device)].to(model.view.device)


def fit_linear(head: Head, norm: nn.Module, states: Tensor, normed: Tensor) -> None:
    """Sets a linear head's adapter to the rank-r matrix M that minimises the mean of |x + M x - y|^2 + `RIDGE` |M|^2.

    x are states at the exit and y those that the final norm got at full depth, each divided by its root mean square:
    the norm behind the head does not see lengths. Least squares from a block's state to the last one are the "linear
    shortcuts" of Din et al. 2023 ("Jump to Conclusions", section 3); the rank is reduced by `screen.low_rank`.

    Args:
        head: of kind "linear".
        norm: the backbone's final norm.
        states: [N, hidden] at the exit's depth.
        normed: [N, hidden], what the final norm makes of the same tokens at full depth.
    """
    x = states.double()
    x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    size = x.shape[1]
    eye = torch.eye(size, dtype=x.dtype, device=x.device)
    gain, bias = _affine(norm, size, normed)
    y = (normed.double() - bias) / gain
    second = x.T @ x / len(x)
    second = second + RIDGE * second.diagonal().mean() * eye
    best = torch.linalg.solve(second, x.T @ (y - x) / len(x)).T
    rank = min(len(head.down.weight), size)
    out, down = low_rank(best.T @ best, second, rank)
    head.up.weight.zero_()  # columns beyond the hidden size have nothing to say
    head.up.weight[:, :rank] = (best @ out).to(head.up.weight)
    head.down.weight[:rank] = down.to(head.down.weight)


def _affine(norm: nn.Module, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a norm's gain and bias [hidden], of whatever kind it is, from what it makes of a state and its negative
    that have mean 0 and length 1 already."""
    signs = torch.ones(size, dtype=like.dtype, device=like.device)
    signs[::2] = -1
    plus, minus = norm(signs[None])[0].double(), norm(-signs[None])[0].double()
    gain = (plus - minus) / 2 * signs.double()
    return torch.where(gain.abs() < 1e-6, torch.full_like(gain, 1e-6), gain), (plus + minus) / 2
