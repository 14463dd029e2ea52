"""Gates trained once their exits stand still, on states kept from one pass over training rows.

Beside moving exits a gate sees each token once, at most, and with a target of the moment. Afterwards what it reads and
what it should say are fixed: one pass finds both, and many passes over them cost next to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adaptive import losses
from adaptive.exits import Gate
from adaptive.ranking import auc
from adaptive.rows import Rows, take, to_batch

PASSES, BATCH, RATE, DECAY = 3, 256, 3e-3, 0.05  # over the examples; at least so many of them per step; AdamW's
STEPS = 4096  # at most: more examples make larger batches


def collect(
    model: nn.Module, rows: Rows, device: torch.device, seed: int, max_tokens: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Returns examples for gates from training rows: states [tokens, exits, hidden] in bfloat16, and bool [tokens,
    exits], whether leaving there does no harm.

    Args:
        model: the `EarlyExitModel`, wrapped by accelerate or not.
        rows: `input_ids`, `attention_mask`, `labels` [rows, tokens], with `states.with_states` or without.
        device: where batches go.
        seed: of the order of rows.
        max_tokens: labelled tokens after which no further batch is read.
        batch_size: rows in one pass.
    """
    model.eval()
    order = torch.randperm(len(rows["labels"]), generator=torch.Generator().manual_seed(seed))
    found, count = [], 0
    bar = tqdm(order.split(batch_size), desc="what gates learn from", unit="batch", leave=False)
    for indices in bar:
        with torch.no_grad():
            states, no_harm = model(**to_batch(take(rows, indices), device), examples=True).examples
        found.append((states.bfloat16(), no_harm))  # half the memory, and a gate does not see the difference
        count += len(states)
        if count >= max_tokens:
            break
    bar.close()
    return tuple(map(torch.cat, zip(*found, strict=True)))


def fit_gates(gates: nn.ModuleList, states: Tensor, no_harm: Tensor, seed: int) -> None:
    """Trains every gate further, in place, with balanced classes (`losses.gate_loss`).

    Args:
        gates: one for each exit; baselines are left as they are.
        states: [tokens, exits, hidden].
        no_harm: [tokens, exits] bool, the targets.
        seed: of the order of tokens.
    """
    for index, gate in enumerate(tqdm(gates, desc="gates", leave=False)):
        if gate.learned and len(states):
            _fit(gate, states[:, index], no_harm[:, index], torch.Generator().manual_seed(seed))


def _fit(gate: Gate, states: Tensor, no_harm: Tensor, generator: torch.Generator) -> None:
    count, batch = len(states), max(BATCH, PASSES * len(states) // STEPS)
    steps = max(PASSES * count // batch, 1)
    gate.prior.fill_(no_harm.float().mean().clamp(0.001, 0.999))
    optimizer = torch.optim.AdamW(gate.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(steps * batch // count + 1)])
    for picked in order[: steps * batch].split(batch):
        picked = picked.to(states.device)
        seen, wanted = states[picked].to(gate.prior.device), no_harm[picked].to(gate.prior.device)
        losses.gate_loss(gate(seen), wanted, gate.prior).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def figures(gates: nn.ModuleList, states: Tensor, no_harm: Tensor, depths: tuple[int, ...]) -> dict[str, float | None]:
    """Returns for each exit the share of examples without harm and, of a gate that learns, how well it ranks them
    ("auc", None where all are alike) and the error of its probabilities ("ece")."""
    found = {}
    for index, (gate, depth) in enumerate(zip(gates, depths, strict=True)):
        harmless = no_harm[:, index]
        found[f"exit_{depth}/no_harm"] = float(harmless.float().mean())
        if gate.learned:
            scores, harmless = gate.score(states[:, index].to(gate.prior.device)).cpu(), harmless.cpu()
            found[f"exit_{depth}/auc"] = auc(scores.double().numpy(), harmless.numpy())
            found[f"exit_{depth}/ece"] = float(losses.calibration_error(scores, harmless))
    return found
