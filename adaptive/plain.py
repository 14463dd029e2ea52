"""Plain transformers checkpoints out of a model with exits: a draft of its first blocks, or its backbone, merged."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from adaptive.certify import load_tokenizer

_CARD = """---
pipeline_tag: text-generation
---

# The first {depth} of {layers} blocks of {name}

A plain `{kind}` checkpoint: the blocks up to an early exit, that exit's norm, and the LM head. It has the vocabulary of
the whole model, and drafts for it:

```
vllm serve {name} --speculative-config '{{"model": "{folder}", "num_speculative_tokens": 4}}'
```

```
python -m sglang.launch_server --model-path {name} --speculative-algorithm STANDALONE \\
    --speculative-draft-model-path {folder} --speculative-num-steps 4 --speculative-eagle-topk 1 \\
    --speculative-num-draft-tokens 5
```

What a draft does to speed depends on how often the whole model agrees with it; it does nothing to what is said.
"""


def merged(model) -> nn.Module:
    """Returns the backbone without adapters: a copy with them merged, or the backbone itself where it has none."""
    if not hasattr(model.backbone, "merge_and_unload"):
        return model.view.inner
    return copy.deepcopy(model.backbone).merge_and_unload()


def merge(model, folder: str | Path, tokenizer=None) -> Path:
    """Writes the backbone, adapters merged, as a checkpoint that stock transformers loads; returns the folder.

    Args:
        model: the `EarlyExitModel`.
        folder: to write.
        tokenizer: saved beside it; the backbone's if None.
    """
    return _write(merged(model), Path(folder), tokenizer or load_tokenizer(model), None)


@torch.no_grad()
def to_draft(model, depth: int, folder: str | Path, tokenizer=None) -> Path:
    """Writes the blocks up to an exit, its norm and the LM head as a checkpoint that stock transformers loads.

    A shortlist is left out: the draft says what the exit would with the whole vocabulary.

    Args:
        model: the `EarlyExitModel`.
        depth: of an exit with a norm head.
        folder: to write; returned.
        tokenizer: saved beside it; the backbone's if None.

    Raises:
        ValueError: no exit at this depth, or its head is more than a norm before the LM head.
    """
    kinds = dict(zip(model.depths, model.exits.kinds, strict=True))
    if kinds.get(depth) != "norm":
        fitting = [at for at, kind in kinds.items() if kind == "norm"]
        raise ValueError(
            f"to_draft: `depth`={depth} "
            + (f"has a head of kind {kinds[depth]!r}" if depth in kinds else "has no exit")
            + f"; a plain checkpoint ends in a norm and the LM head, as exits at {fitting or 'no depth here'} do"
        )
    whole, view = merged(model), model.view
    config = copy.deepcopy(view.config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == view.num_layers:
            setattr(config, name, value[:depth])
    config.num_hidden_layers = depth
    draft = type(whole)(config).to(model.dtype)
    blocks = next(f"{name}." for name, module in view.inner.named_modules() if module is view.blocks)
    norm = next(f"{name}." for name, module in view.inner.named_modules() if module is view.norm)
    exit = model.exits.heads[model.depths.index(depth)]
    weights = {
        name: value
        for name, value in whole.state_dict().items()
        if not name.startswith(blocks) or int(name.removeprefix(blocks).split(".")[0]) < depth
    }
    draft.load_state_dict(weights | {norm + name: value for name, value in exit.norm.state_dict().items()})
    draft.generation_config = copy.deepcopy(whole.generation_config)
    name = str(view.inner.name_or_path or "the whole model")
    card = _CARD.format(
        depth=depth, layers=view.num_layers, name=name, kind=config.model_type, folder=Path(folder).name
    )
    return _write(draft, Path(folder), tokenizer or load_tokenizer(model), card)


def _write(plain: nn.Module, folder: Path, tokenizer, card: str | None) -> Path:
    """Writes a checkpoint, whole or not at all; returns the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"'{folder}' is not empty; choose another folder")
    fresh = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
    try:
        plain.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        if card is not None:
            (fresh / "README.md").write_text(card)
        fresh.chmod(0o755)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder
