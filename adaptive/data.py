"""What goes into training and calibration: texts, packed tokens, token files, splits, digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_SUFFIXES = (".txt", ".jsonl")


def read_texts(source: str | Path, render: Callable[[list[dict[str, str]]], str] | None = None) -> list[str]:
    """The texts of a file, a folder or a named data set, in a fixed order; blank ones are left out.

    A `.txt` file is one text. A row of a `.jsonl` file or data set has `text`, or a conversation: `messages`, or
    `prompt` and `answer`. A folder is read with its subfolders. A data set is `name` or `name:config:split:field`,
    where any part but the name may be empty; the split is then "train", and `field` is the column of the text.

    Args:
        source: path or name.
        render: conversation -> text, such as the tokenizer's chat template; needed for conversations only.

    Raises:
        ValueError: nothing found, an unreadable line or a row with other fields.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
        texts = [text for file in files for text in _read_file(file, render)]
        looked_at = f"{len(files)} .txt and .jsonl files of the folder {path}"
    elif path.is_file():
        texts, looked_at = _read_file(path, render), f"the file {path}"
    elif path.suffix in (*_SUFFIXES, ".json") or path.is_absolute():
        raise ValueError(f"there is no file or folder {path}; check the path (relative ones start at {Path.cwd()})")
    else:
        texts, looked_at = _read_dataset(str(source), render), f"the data set {source}"
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"no text in {looked_at}; give .txt files, .jsonl files or a data set with at least one text")
    return texts


def _read_file(path: Path, render: Callable | None) -> list[str]:
    """The texts of one .txt or .jsonl file."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} is no {' or '.join(_SUFFIXES)} file; convert it, one text per file or per line")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it or leave it out") from error
    if path.suffix == ".txt":
        return [content]
    texts = []
    # Not `splitlines`, which also breaks at characters that JSON allows inside a text.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); each line must be one JSON object") from error
            texts.append(_row_text(row, render, f"{path}:{number}"))
    return texts


def _read_dataset(source: str, render: Callable | None) -> list[str]:
    """The texts of `name:config:split:field`."""
    import datasets

    parts = source.split(":")
    if len(parts) > 4:
        raise ValueError(f"data set {source!r} has {len(parts)} parts; allowed: name:config:split:field")
    name, config, split, field = parts + [""] * (4 - len(parts))
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} is no file or folder here, and no data set of that name can be loaded ({error}); "
            "check the path, or the name and the way to the hub"
        ) from error
    if field and field not in rows.column_names:
        raise ValueError(f"data set {name!r} has no field `{field}`; it has {', '.join(rows.column_names)}")
    if field:
        return [str(text) for text in rows[field]]
    return [_row_text(row, render, f"{source} row {number}") for number, row in enumerate(rows)]


def _row_text(row: Any, render: Callable | None, place: str) -> str:
    """The text of one row; conversations go through `render`."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and "messages" in row:
        messages = row["messages"]
    elif isinstance(row, dict) and {"prompt", "answer"} <= row.keys():
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
    else:
        found = f"the keys {', '.join(map(repr, row))}" if isinstance(row, dict) else f"{type(row).__name__}, no object"
        raise ValueError(f"{place}: found {found}; wanted 'text' (text), 'messages', or 'prompt' and 'answer'")
    if render is None:
        raise ValueError(f"{place}: a conversation, where plain text is read; use a row with 'text' or pass `render`")
    return render(messages)


def pack(token_lists: Iterable[Sequence[int]], length: int, separator: int) -> np.ndarray:
    """All tokens in a row, cut into sequences: int32 [sequences, length]; what is left at the end is dropped.

    Args:
        token_lists: the tokens of each text.
        length: tokens per sequence.
        separator: token put after each text, the end-of-text token of the model.

    Raises:
        ValueError: fewer tokens than one sequence.
    """
    parts = [np.asarray([*tokens, separator], dtype=np.int32) for tokens in token_lists]
    total = sum(map(len, parts))
    if total < length:
        raise ValueError(
            f"{len(parts)} texts have {total} tokens with their separators, fewer than one sequence of {length}; "
            "give more text or a smaller sequence length"
        )
    return np.concatenate(parts)[: total // length * length].reshape(-1, length)


def save_tokens(
    path: str | Path, tensors: Mapping[str, np.ndarray | torch.Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Writes token rows as one safetensors file, whole or not at all: an earlier file stays until the new one is done.

    Args:
        path: the file.
        tensors: `input_ids` [rows, length] and whatever goes with each row, such as `labels` (-100 = no target).
        metadata: JSON values that say where the rows came from.

    Raises:
        ValueError: no `input_ids`, no rows, or unequal numbers of rows.
        OSError: it could not be written.
    """
    arrays = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    rows = {shape[:1] for shape in shapes.values()}
    if "input_ids" not in arrays or len(rows) != 1 or 0 in shapes["input_ids"] or len(shapes["input_ids"]) != 2:
        raise ValueError(f"{path}: tensors {shapes}; give `input_ids` [rows, length] and as many rows in all")
    from safetensors.numpy import save

    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        unfinished.write_bytes(save(arrays, metadata={"adaptive": json.dumps(metadata or {})}))
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error}); what was there stays: make room and run it again") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_tokens(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the metadata that `save_tokens` wrote.

    Raises:
        ValueError: no such file, or not a whole one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["adaptive"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except FileNotFoundError as error:
        raise ValueError(f"there is no token file {path}; check the path or make it first") from error
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no whole token file ({error!r}); delete it and make it again") from error


def split(
    rows: Sequence | np.ndarray, seed: int, shares: Mapping[str, float]
) -> dict[str, list] | dict[str, np.ndarray]:
    """Disjoint parts of `rows`, drawn by `seed` alone, each in the order of `rows`.

    Args:
        rows: a list, or an array whose first axis is rows; the parts are of the same kind.
        seed: equal seeds and numbers of rows give equal parts.
        shares: part -> share of the rows; together at most 1.

    Raises:
        ValueError: impossible shares, or a part without a row.
    """
    if not shares or min(shares.values()) <= 0 or sum(shares.values()) > 1 + 1e-9:
        raise ValueError(f"`shares` is {dict(shares)}; each must be above 0 and their sum at most 1")
    # The legacy generator on purpose: numpy promises that its numbers never change, and a certificate names the seed.
    order = np.random.RandomState(seed).permutation(len(rows))
    ends = np.rint(np.cumsum([0.0, *shares.values()]) * len(rows)).astype(int)
    parts = {name: np.sort(order[start:end]) for name, start, end in zip(shares, ends[:-1], ends[1:])}
    empty = [name for name, chosen in parts.items() if not len(chosen)]
    if empty:
        raise ValueError(f"{len(rows)} rows in shares {dict(shares)} leave none for {', '.join(empty)}; give more rows")
    if isinstance(rows, np.ndarray):
        return {name: rows[chosen] for name, chosen in parts.items()}
    return {name: [rows[index] for index in chosen] for name, chosen in parts.items()}


def digest(content: bytes | Mapping[str, np.ndarray | torch.Tensor]) -> str:
    """sha256 of bytes, or of named arrays or tensors: names, types, shapes and values count, the order does not."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    total = hashlib.sha256()
    for name in sorted(content):
        values = content[name]
        if isinstance(values, np.ndarray):
            raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        else:
            import torch

            # As bytes, since numpy has no bfloat16.
            raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        kind = str(values.dtype).removeprefix("torch.")
        total.update(json.dumps([name, kind, list(values.shape)]).encode())
        total.update(raw)
    return total.hexdigest()
