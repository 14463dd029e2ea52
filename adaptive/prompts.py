"""Prompts as token ids: rendered through the chat template where there is one, and left-padded into batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Prompt = str | Sequence[int] | Sequence[dict[str, str]]


def encode(prompts: Sequence[Prompt], tokenizer) -> list[list[int]]:
    """Returns the ids of each prompt.

    Args:
        prompts: ids are taken as they are; chat messages, and strings as what the user says, go through the tokenizer's
            chat template; strings are plain text for a tokenizer without one.
        tokenizer: of the backbone.

    Raises:
        ValueError: no prompts, an empty one, or something else than prompts.
    """
    if fault := _fault(prompts):
        raise ValueError(f"`prompts` {fault}")
    if not len(prompts):
        raise ValueError("no prompts were given; give at least one")
    out = [_encode(prompt, tokenizer) for prompt in prompts]
    if empty := [index for index, ids in enumerate(out) if not ids]:
        raise ValueError(f"prompts {empty[:5]} are empty; leave them out")
    return out


def _encode(prompt: Prompt, tokenizer) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer.chat_template is None:
            return tokenizer.encode(prompt)
        prompt = [{"role": "user", "content": prompt}]
    if len(prompt) and isinstance(prompt[0], dict):
        if tokenizer.chat_template is None:
            raise ValueError(
                f"a prompt is a conversation of {len(prompt)} messages, but the model's tokenizer has no chat template "
                "to put it into words; give such prompts as strings"
            )
        return list(
            tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    return [int(token) for token in prompt]


def is_ids(prompt: Prompt) -> bool:
    """Returns whether a prompt is token ids already, so that no tokenizer is needed for it."""
    return not isinstance(prompt, str) and not (len(prompt) and isinstance(prompt[0], dict))


def read_parts(path: str | Path, *names: str) -> list[list[Prompt]]:
    """Returns the parts of these names of a .json file of prompts, such as train/text.py writes.

    Raises:
        ValueError: no object of lists of prompts, or a part that it lacks.
    """
    parts = json.loads(Path(path).read_text(encoding="utf-8"))
    wanted = ", ".join(f'"{name}": [...]' for name in names)
    if not isinstance(parts, dict):
        raise ValueError(
            f"{path} holds a {type(parts).__name__}; wanted an object {{{wanted}}}; prompts that are to be divided go "
            'into a .jsonl file, a {"text": ...} or {"messages": [...]} on each line'
        )
    if missing := [name for name in names if name not in parts or parts[name] == []]:
        raise ValueError(f"{path} lacks {missing}; it has {sorted(parts)}; wanted {{{wanted}}}, none of them empty")
    if wrong := [f"`{name}` of {path} {fault}" for name in names if (fault := _fault(parts[name]))]:
        raise ValueError("; ".join(wrong))
    return [parts[name] for name in names]


def until_last_question(messages: list[dict[str, str]]) -> Prompt:
    """Returns a conversation up to what the user said last; a lone question as a string, which a tokenizer without a
    chat template takes, too.

    Raises:
        ValueError: the user says nothing in it, or it is none.
    """
    turns = messages if isinstance(messages, list) else []
    asked = [index for index, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"]
    if not asked:
        raise ValueError(
            f"the conversation {messages!r:.120} has no message of the user; give a list of "
            '{"role": ..., "content": ...}, one of them with the role "user", or leave it out'
        )
    turns = turns[: asked[-1] + 1]
    return turns[0]["content"] if len(turns) == 1 else turns


def _fault(prompts: object) -> str:
    """Says what keeps something from being a list of prompts; empty if nothing does."""
    if isinstance(prompts, (str, Mapping)) or not hasattr(prompts, "__len__"):
        return f"is of the type {type(prompts).__name__}; give a list of prompts"
    for index, prompt in enumerate(prompts):
        if not _is_prompt(prompt):
            return (
                f"has {prompt!r:.60} at place {index}, of the type {type(prompt).__name__}; a prompt is a string, or "
                "a list of chat messages or of token ids"
            )
    return ""


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, Mapping) or not hasattr(prompt, "__len__"):
        return False
    messages = len(prompt) and isinstance(prompt[0], dict)
    return all(isinstance(p, dict) and "role" in p if messages else hasattr(p, "__int__") for p in prompt)


def pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns what each token adds to the text; a character of several tokens comes with its last one."""
    texts = [tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in range(len(ids) + 1)]
    return [longer[len(text) :] for text, longer in pairwise(texts)]


def left_pad(prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Returns ids and attention mask [batch, longest], padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def distinct(prompts: list[list[int]]) -> list[list[int]]:
    """Returns the prompts without repetitions: a repeated one would count as independent evidence."""
    return [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]


def padded(lists: list[list[int]]) -> np.ndarray:
    """Returns ids [rows, longest], -1 behind the end of each."""
    longest = max(map(len, lists))
    return np.array([ids + [-1] * (longest - len(ids)) for ids in lists])


def unpadded(ids: np.ndarray) -> list[list[int]]:
    """Returns the lists that `padded` was given."""
    return [row[row >= 0].tolist() for row in ids]
