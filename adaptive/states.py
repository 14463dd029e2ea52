"""What a frozen backbone makes of training rows, worked out once and kept in files.

A frozen backbone's pass is most of a training step, and the same whenever a row comes back: in the next pass over the
rows, and in every other run on them. A file holds one depth, so that runs with other depths add only what is missing.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from adaptive import data, storage
from adaptive.objective import full_states, tops
from adaptive.rows import Rows, take, to_batch
from adaptive.runs import put


def with_states(model, rows: Rows, folder: Path, batch_size: int = 8) -> Rows:
    """Returns the rows with two entries more, both in the backbone's type and place on the CPU.

    "states" [rows, tokens, exits + 1, hidden] are the states at the model's depths and, last, the normed state at full
    depth; "top" [rows, tokens, k] are the full model's best k = `LossConfig.top_k` entries where the next token is
    labelled. They take 4 * rows * tokens * (exits + 1) * hidden bytes of memory for a float32 backbone.

    Args:
        model: the `EarlyExitModel`; its backbone does not learn.
        rows: `input_ids`, `attention_mask`, `labels` [rows, tokens].
        folder: keeps the states, one folder for each pair of rows and backbone.
        batch_size: rows in one pass.

    Raises:
        OSError: they could not be written.
    """
    settings = {k: v for k, v in model.view.config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
    known = json.dumps(settings, sort_keys=True, default=str)
    key = data.digest((storage.digest(model.view.inner) + known + data.digest(rows)).encode())[:16]
    names = [f"depth-{depth}" for depth in model.depths] + [f"final-{model.loss_config.top_k}"]
    paths = {name: Path(folder) / key / f"{name}.safetensors" for name in names}
    found = {name: loaded for name, path in paths.items() if (loaded := _read(path)) is not None}
    if missing := [name for name in names if name not in found]:
        for name, tensors in _worked_out(model, rows, missing, batch_size).items():
            put(paths[name], lambda fresh, tensors=tensors: save_file(tensors, fresh))
            found[name] = tensors
    return rows | {
        "states": torch.stack([found[name]["states"] for name in names], dim=2),
        "top": found[names[-1]]["top"],
    }


def _read(path: Path) -> dict | None:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


@torch.no_grad()
def _worked_out(model, rows: Rows, names: list[str], batch_size: int) -> dict[str, dict]:
    """Returns "states" [rows, tokens, hidden] for each name, and "top" [rows, tokens, k] for the final one."""
    view, top_k = model.view, model.loss_config.top_k
    count, width = rows["input_ids"].shape
    depths = tuple(int(name.split("-")[1]) for name in names if name.startswith("depth"))
    out = {name: {"states": torch.zeros(count, width, view.hidden_size, dtype=model.dtype)} for name in names}
    final = names[-1] if names[-1].startswith("final") else None
    if final:
        out[final]["top"] = torch.zeros(count, width, min(top_k, view.vocab_size), dtype=torch.int32)
    for indices in tqdm(torch.arange(count).split(batch_size), desc="states", unit="batch"):
        batch = to_batch(take(rows, indices), model.device)
        states, normed, _ = full_states(view, batch["input_ids"], batch.get("attention_mask"), depths)
        for name, state in zip(names, [*states, normed], strict=False):
            out[name]["states"][indices, : state.shape[1]] = state.cpu()
        if final:
            keep = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
            picked = tops(view, normed[:, :-1][keep], top_k).int().cpu()
            out[final]["top"][indices[keep[0].cpu()], keep[1].cpu()] = picked
    return out
