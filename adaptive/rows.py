"""Rows of tokens: made from whatever the configuration names, split, and dealt out to training steps.

Which rows a step sees is a function of the seed and the step alone: a resumed run and each of several processes work
out the same order, and a checkpoint records no sampler.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from adaptive import data
from adaptive.pretrained import resolve

Rows = dict[str, Tensor]  # "input_ids", "labels", "attention_mask" [rows, tokens]; what `states` keeps with them
HELD_OUT, HELD_OUT_ROWS = 0.05, 32  # share of the rows that evaluation keeps for itself, and at most so many


def load_rows(sources: Sequence[str], model_id: str, length: int) -> Rows:
    """All rows, int32 [rows, tokens]: those of token files as they are, and texts, tokenised and packed.

    Args:
        sources: token files (`.safetensors`), and anything that `data.read_texts` takes.
        model_id: whose tokenizer reads the texts.
        length: tokens per row of packed text; where token files have longer rows, all others are padded on the right.

    Raises:
        ValueError: nothing there, or less text than one row.
    """
    files = [source for source in sources if source.endswith(".safetensors")]
    named = [source for source in sources if source not in files]
    parts = [data.load_tokens(file)[0] for file in files]
    if named:
        parts.append({"input_ids": _read_texts(named, model_id, length)})
    width = max(part["input_ids"].shape[1] for part in parts)
    parts = [_complete(part, width) for part in parts]
    return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def split_rows(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """The rows to train on and the held-out ones.

    Raises:
        ValueError: there are not two rows.
    """
    labelled = (rows["labels"][:, 1:] != -100).any(1)
    if not labelled.all():  # a row that asks for nothing teaches nothing, and a batch of such has no mean
        rows = take(rows, labelled)
    count, length = rows["input_ids"].shape
    if count < 2:
        raise ValueError(
            f"`data` makes {count} row of {length} tokens; training needs 2 at least, one of them held out. Give more "
            "text, or lower `sequence_length`"
        )
    held_out = min(HELD_OUT_ROWS, max(1, int(count * HELD_OUT))) / count
    parts = data.split(np.arange(count), seed, {"train": 1 - held_out, "held_out": held_out})
    return take(rows, torch.from_numpy(parts["train"])), take(rows, torch.from_numpy(parts["held_out"]))


def take(rows: Rows, indices: Tensor) -> Rows:
    """The rows at `indices`."""
    return {name: tensor[indices] for name, tensor in rows.items()}


def to_batch(rows: Rows, device: torch.device) -> Rows:
    """The rows on a device, integers as int64, without columns that are padding in all or a mask that masks none."""
    used = rows["attention_mask"].any(0).nonzero()
    width = int(used[-1]) + 1 if len(used) else 1
    batch = {name: tensor[:, :width].to(device) for name, tensor in rows.items()}
    batch = {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in batch.items()}
    if batch["attention_mask"].all():
        del batch["attention_mask"]
    return batch


def num_labelled(rows: Rows) -> int:
    """Number of positions whose next token is wanted."""
    return int((rows["labels"][:, 1:] != -100).sum())


def rows_of_step(step: int, count: int, per_step: int, seed: int) -> Tensor:
    """Indices [per_step] of the rows of a step: all `count` rows over and over, each time in a new order."""
    positions = range(step * per_step, (step + 1) * per_step)
    return torch.stack([_order(position // count, count, seed)[position % count] for position in positions])


@lru_cache(maxsize=2)
def _order(epoch: int, count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1))


def _read_texts(sources: list[str], model_id: str, length: int) -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(model_id))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model_id} has no end-of-text token to put between texts; set `eos_token`")
    puts_first = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    first = tokenizer.bos_token if puts_first else ""

    def render(messages: list[dict[str, str]]) -> str:
        # Of a tokenizer that puts the first token of a text there itself; others (SmolLM2's) only name one.
        return tokenizer.apply_chat_template(messages, tokenize=False).removeprefix(first)

    texts = [text for source in sources for text in data.read_texts(source, render)]
    return data.pack(tokenizer(texts, verbose=False)["input_ids"], length, tokenizer.eos_token_id)


def _complete(arrays: dict[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
    """The three tensors of `Rows`, `width` wide; where labels are not given every token that is not padding is one."""
    ids = arrays["input_ids"].astype(np.int32)
    mask = arrays.get("attention_mask", np.ones_like(ids)).astype(np.int32)
    labels = arrays.get("labels", np.where(mask == 0, -100, ids)).astype(np.int32)
    wider = [(0, 0), (0, width - ids.shape[1])]
    return {
        "input_ids": np.pad(ids, wider),
        "labels": np.pad(labels, wider, constant_values=-100),
        "attention_mask": np.pad(mask, wider),
    }
