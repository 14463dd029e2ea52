"""What a model's states already know of its answer: states of text that it writes itself, and linear probes on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from adaptive.certify import load_tokenizer
from adaptive.kv import KV

BATCH = 128  # rows written at once
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the probe, relative to its inputs' mean square


@torch.no_grad()
def written_states(model, depths: Sequence[int], count: int, length: int, seed: int) -> list[dict]:
    """Returns the states {depth: [tokens, hidden]} of each row that the model writes when it is only told that somebody
    speaks, and under "full" the normed ones of the full depth. Writing has them all, so that nothing is read twice.

    Args:
        model: the `EarlyExitModel`.
        depths: after which blocks to keep states.
        count: number of rows.
        length: tokens of each.
        seed: of what is sampled.
    """
    tokenizer, view, out = load_tokenizer(model), model.view, []
    # Of a chat model, the template up to where the user speaks; it then asks and answers itself.
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id or 0]
    if tokenizer.chat_template:
        mark = "\N{SNOWMAN}"
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
        start = tokenizer.encode(text[: text.index(mark)], add_special_tokens=False)
    generator = torch.Generator(model.device).manual_seed(seed)
    bar = tqdm(total=count * length, desc="writing text", unit="token")
    for first in range(0, count, BATCH):
        size = min(BATCH, count - first)
        ids, steps = torch.tensor([start] * size, device=model.device), []
        kv = KV(view.num_layers, len(start) + length, size)
        for _ in range(length):
            hidden, calls = view.start(ids, None, None, kv)
            found, depth = {}, 0
            for after in [*depths, view.num_layers]:
                hidden, depth = view.run(hidden, calls, depth, after), after
                found[after] = hidden[:, -1]
            found["full"] = view.norm(found.pop(view.num_layers))
            steps.append({depth: state.float() for depth, state in found.items()})
            kv.column += ids.shape[1]
            ids = torch.multinomial(view.logits(found["full"]).float().softmax(-1), 1, generator=generator)
            bar.update(size)
        out += [{depth: torch.stack([step[depth][row] for step in steps]) for depth in steps[0]} for row in range(size)]
    bar.close()
    return out


def fit_probe(inputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Returns the affine map [hidden + 1, hidden] that takes a depth's normed states to the full depth's in least
    squares, and its ridge, chosen on the last fifth (Belrose et al. 2023, "Tuned Lens", section 2; here solved)."""
    inputs, targets = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1).double(), targets.double()
    cut, best = len(inputs) * 4 // 5, None
    gram, cross = inputs[:cut].T @ inputs[:cut], inputs[:cut].T @ targets[:cut]
    scale = torch.eye(len(gram), device=gram.device, dtype=gram.dtype) * gram.diagonal().mean()
    for ridge in RIDGES:
        found = torch.linalg.solve(gram + ridge * scale, cross)
        error = float((inputs[cut:] @ found - targets[cut:]).square().mean())
        if best is None or error < best[0]:
            best = (error, ridge)
    rest = inputs[cut:]
    gram, cross = gram + rest.T @ rest, cross + rest.T @ targets[cut:]
    return torch.linalg.solve(gram + best[1] * scale, cross).float(), best[1]
