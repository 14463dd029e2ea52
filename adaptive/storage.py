"""Exits on disk: exits.safetensors, exit_config.json, certificate.json and a model card, whole or not at all.

Everything is written into a temporary folder first and moved into place when it is complete, so a full disk or an
interrupt leaves what was there before. (Who is killed while files are being moved leaves a mixture, which loading
refuses.)
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from adaptive import __version__
from adaptive.calibration import Certificate
from adaptive.card import model_card
from adaptive.config import ExitConfig, LossConfig
from adaptive.pretrained import resolve
from adaptive.runs import put

logger = logging.getLogger(__name__)
WEIGHTS, CONFIG, CERTIFICATE, ADAPTER = "exits.safetensors", "exit_config.json", "certificate.json", "adapter"
FORMAT = 2


def digest(module: nn.Module) -> str:
    """Returns the sha256 of a module's parameters and buffers: names, types, shapes and bytes."""
    out = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        out.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        out.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return out.hexdigest()


def model_digest(model) -> str:
    """Returns the sha256 that a certificate names: of the backbone as it is loaded (type included), its exits and where
    they sit. An exported folder knows its own."""
    if hasattr(model, "digest"):
        return model.digest
    where = json.dumps(model.exit_config.to_dict(), sort_keys=True)
    return hashlib.sha256((digest(model.view.inner) + digest(model.exits) + where).encode()).hexdigest()


def save(model, folder: Path) -> None:
    """Writes a model's exits, and of the backbone what cannot be had elsewhere.

    Raises:
        OSError: the disk is full or the folder cannot be written; files of an earlier save are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        source = _write_backbone(model, fresh)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in model.exits.state_dict().items()}
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        record = {
            "format": FORMAT,
            "adaptive_version": __version__,
            "backbone": source,
            "mode": model.mode,
            "backbone_digest": digest(model.view.inner),
            "adapter": hasattr(model.backbone, "peft_config") and model.mode != "full",
            "dtype": str(model.dtype).removeprefix("torch."),
            "exits_sha256": _sha256(fresh / WEIGHTS),
            "exits": model.exit_config.to_dict(),
            "loss": asdict(model.loss_config),
        }
        (fresh / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        if model.certificate is not None:
            model.certificate.save(fresh / CERTIFICATE)
        (fresh / "README.md").write_text(model_card(model, source, model.mode))
        _move_in(fresh, folder, [] if model.certificate is not None else [CERTIFICATE])  # it was of other exits
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not save to '{folder}': {error}; what was saved there before is untouched; make room or "
            "choose another folder, and save again"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _move_in(fresh: Path, folder: Path, gone: list[str]) -> None:
    """Moves all that is in `fresh` into a folder, and takes away what is `gone`; on an error nothing has changed."""
    old = Path(tempfile.mkdtemp(prefix=".saved-", dir=folder))
    moved = []
    try:
        for name in [*sorted(path.name for path in fresh.iterdir()), *gone]:
            if (folder / name).exists():
                os.replace(folder / name, old / name)
            if (fresh / name).exists():
                os.replace(fresh / name, folder / name)
                moved.append(name)
    except BaseException:
        for name in moved:
            os.replace(folder / name, fresh / name)
        for path in old.iterdir():
            os.replace(path, folder / path.name)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write_backbone(model, folder: Path) -> str | None:
    """Returns where the backbone can be loaded from, None for the folder itself; writes it there if need be.

    Raises:
        ValueError: a PEFT adapter of another name than "default".
    """
    adapted = hasattr(model.backbone, "peft_config")
    if adapted and list(model.backbone.peft_config) != ["default"]:
        raise ValueError(
            f"the backbone has the adapters {list(model.backbone.peft_config)}; one, named 'default', can be saved: "
            "merge or rename them"
        )
    name = str(getattr(model.view.inner, "name_or_path", "") or "")
    if name and Path(name).is_dir():
        name = str(Path(name).resolve())
    if adapted and model.mode != "full":
        model.backbone.save_pretrained(folder / ADAPTER)
    # A backbone that lies in a run's own folder was trained with it, or had no other home.
    if name and model.mode != "full" and not (Path(name) / CONFIG).exists():
        return name
    inner = model.view.inner
    if adapted:
        copied = copy.deepcopy(model.backbone)
        inner = copied.merge_and_unload() if model.mode == "full" else copied.unload()
    inner.save_pretrained(folder)
    _write_tokenizer(name, folder)
    return None


def _write_tokenizer(name: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(resolve(name)).save_pretrained(folder)
    except (OSError, ValueError, KeyError):
        logger.info("no tokenizer came with '%s'; save yours to '%s' yourself", name, folder)


def save_certificate(model, folder: Path) -> None:
    """Writes a model's certificate, and the model card that states it, into the folder it was saved to."""
    record = _read_config(folder)
    model.certificate.save(folder / CERTIFICATE)
    put(folder / "README.md", lambda path: path.write_text(model_card(model, record["backbone"], record["mode"])))


def load(cls, folder: str, backbone: nn.Module | None, kwargs: dict):
    """Returns a saved `EarlyExitModel`; see `EarlyExitModel.from_pretrained`."""
    revision = kwargs.pop("revision", None)
    path = Path(folder)
    if not path.is_dir():
        path = _download(folder, revision)
    record = _read_config(path)
    tensors = _read_weights(path, record)
    if backbone is None:
        backbone = _load_backbone(path, record, kwargs)
    elif kwargs:
        raise ValueError(f"{sorted(kwargs)} only go without a loaded backbone")
    model = cls(backbone, ExitConfig.from_dict(record["exits"]), LossConfig(**record["loss"])).eval()
    _fill(model.exits, tensors)
    if digest(model.view.inner) != record["backbone_digest"]:
        logger.warning(
            "the exits in '%s' were trained on other weights, or on these in another precision, than the "
            "backbone they sit in now: expect other scores and recalibrate",
            folder,
        )
    if (path / CERTIFICATE).exists():
        certificate = Certificate.load(path / CERTIFICATE)
        warning = certificate.check(model_digest(model))
        if warning:
            logger.warning(warning)
        model.certify(certificate)
    return model


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision))
    except Exception as error:  # the hub's errors have no common base besides this
        raise ValueError(
            f"'{repo}' is neither a folder nor a repository that can be downloaded ({type(error).__name__}: "
            f"{error}); give a folder written by save_pretrained"
        ) from error


def _read_config(path: Path) -> dict:
    if not (path / CONFIG).exists():
        raise ValueError(
            f"'{path}' has no {CONFIG}; it holds {sorted(p.name for p in path.iterdir())}; give a folder "
            "written by save_pretrained"
        )
    try:
        record = json.loads((path / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path / CONFIG}' is not JSON ({error}); save the model again") from None
    missing = {
        "format",
        "backbone",
        "mode",
        "backbone_digest",
        "exits_sha256",
        "adapter",
        "dtype",
        "exits",
        "loss",
    } - set(record)
    if missing:
        raise ValueError(f"'{path / CONFIG}' lacks {sorted(missing)}; save the model again")
    if record["format"] > FORMAT:
        raise ValueError(
            f"'{path / CONFIG}' has format {record['format']}, this version reads up to {FORMAT}; upgrade "
            "adaptive-exits"
        )
    if record["format"] == 1:  # before fills were fitted
        record["exits"]["fill"] = "projected"
    return record


def _read_weights(path: Path, record: dict) -> dict:
    if not (path / WEIGHTS).exists():
        raise ValueError(f"'{path}' has no {WEIGHTS}; copy it there, or save the model again")
    if _sha256(path / WEIGHTS) != record["exits_sha256"]:
        raise ValueError(
            f"'{path / WEIGHTS}' is not the file that {CONFIG} was written with (sha256 differs): it is "
            "truncated or was changed; restore it or save the model again"
        )
    return load_file(path / WEIGHTS)


def _load_backbone(path: Path, record: dict, kwargs: dict) -> nn.Module:
    name = record["backbone"]
    kwargs = {"dtype": record["dtype"], **kwargs}
    backbone = AutoModelForCausalLM.from_pretrained(path if name is None else resolve(name), **kwargs)
    backbone.name_or_path = str(path) if name is None else name
    if record["adapter"]:
        from peft import PeftModel

        backbone = PeftModel.from_pretrained(backbone, path / ADAPTER)
    return backbone


def _fill(exits: nn.Module, tensors: dict) -> None:
    own = exits.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the backbone needs {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        raise ValueError(
            "the saved exits do not fit this backbone: " + "; ".join(sorted(problems)) + ". Load them on the "
            "model they were trained on"
        )
    exits.load_state_dict(tensors)


def push(model, repo_id: str, private: bool | None, token: str | None, commit_message: str) -> str:
    """Uploads what `save` writes; returns the commit's address. A model card that the repository has is kept."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        keep = ["README.md"] if api.file_exists(repo, "README.md") else None
        info = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message, ignore_patterns=keep)
    return str(info.commit_url)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
