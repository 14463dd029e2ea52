"""What a training run keeps in its folder, so that it can be interrupted, resumed and recognised when it is finished.

    run.json               the configuration, written when the run starts
    last/state.safetensors everything that training changes, and in its header how far training was
    metrics.jsonl          one line per optimizer step
    summary.json           written when the run is finished

Every file is made beside its place and then moved there: an interrupt or a full disk leaves the one from before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

STATE = Path("last") / "state.safetensors"


def earlier_run(folder: Path, record: dict, resume: bool) -> dict | None:
    """The summary of a finished run with this configuration; None when there is something to do.

    Args:
        folder: the run's folder; it need not exist.
        record: the configuration as plain JSON values.
        resume: whether to go on with an interrupted run.

    Raises:
        ValueError: the folder holds another run, or an interrupted one that is not to be resumed.
    """
    if not (folder / "run.json").exists():
        return None
    then = json.loads((folder / "run.json").read_text())
    if other := _differences(then, record):
        raise ValueError(
            f"`output` {folder} holds a run of another configuration: {other}. Choose another `output`, or delete that "
            "folder"
        )
    if (folder / "summary.json").exists():
        return json.loads((folder / "summary.json").read_text())
    if not resume:
        raise ValueError(
            f"`output` {folder} holds an interrupted run of this configuration. Add --resume to go on with it, or "
            "delete that folder"
        )
    return None


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Writes everything that training changes: trained weights, the exits' buffers, what the optimizer remembers.

    Args:
        folder: the run's folder.
        model: an `EarlyExitModel`, unwrapped.
        optimizer: of its trainable parameters; its state is one tensor per parameter and kind, as AdamW's is.
        progress: JSON values for the header.

    Raises:
        OSError: the file could not be written.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    tensors = {f"model/{name}": tensor for name, tensor in trained.items()}
    tensors |= {f"model/exits.{name}": tensor for name, tensor in model.exits.named_buffers()}
    for name, weight in trained.items():
        tensors |= {f"{kind}/{name}": tensor for kind, tensor in optimizer.state.get(weight, {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    put(folder / STATE, lambda path: save_file(tensors, path, {"progress": json.dumps(progress)}))


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, same: dict) -> dict | None:
    """Puts back what `save_state` wrote; returns its `progress`, None when there is none yet.

    Args:
        folder: the run's folder.
        model, optimizer: as they were at step 0.
        same: what `progress` must agree with.

    Raises:
        ValueError: the file is broken or disagrees with `same`.
    """
    path = folder / STATE
    if not path.exists():
        return None
    progress, tensors = read_state(path)
    if other := _differences(progress, same):
        raise ValueError(
            f"`{path}` goes with another run: {other}. Resume with the same data and number of processes, or train "
            "into another `output`"
        )
    weights = dict(model.named_parameters()) | {f"exits.{name}": buffer for name, buffer in model.exits.named_buffers()}
    for key, tensor in tensors.items():
        kind, name = key.split("/")
        if kind == "model":
            weights[name].data.copy_(tensor)
        else:
            # AdamW counts its steps on the CPU.
            optimizer.state[weights[name]][kind] = tensor if kind == "step" else tensor.to(weights[name].device)
    return progress


def read_state(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns the progress in a state's header, and its tensors by name.

    Raises:
        ValueError: it is no whole file, or none of a training run.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{path}` cannot be read: {error}. Delete it to start from the first step") from error
    if "progress" not in header:
        raise ValueError(
            f"`{path}` cannot be resumed from: its header does not say how far training was, so something else wrote "
            "it. Delete it to start from the first step"
        )
    return json.loads(header["progress"]), tensors


class Metrics:
    """The lines of metrics.jsonl, from the step where training goes on.

    Args:
        folder: the run's folder.
        step: steps done; lines after the last checkpoint are dropped, those steps are taken again.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines()[:step] if self.path.exists() else []
        put(self.path, lambda fresh: fresh.write_text("".join(line + "\n" for line in lines)))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a step's line."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file in one move."""
    put(path, lambda fresh: fresh.write_text(json.dumps(value, indent=2) + "\n"))


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside `path`, and moves it there when it is whole.

    Raises:
        OSError: it could not be written; what was at `path` is untouched.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(fresh)
        os.replace(fresh, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path}: {error}. What was there is untouched; make room, and run it again"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def _differences(then: dict, now: dict) -> str:
    """What is not as it was, in words; empty when all is."""
    other = [name for name in now if then.get(name) != now[name]]
    return "; ".join(f"`{name}` is {then.get(name)} there, {now[name]} now" for name in other)
