"""Prompts as token ids: rendered through the chat template where there is one, and left-padded into batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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
        ValueError: no prompts, or an empty one.
    """
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
        return list(
            tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    return [int(token) for token in prompt]


def is_ids(prompt: Prompt) -> bool:
    """Returns whether a prompt is token ids already, so that no tokenizer is needed for it."""
    return not isinstance(prompt, str) and not (len(prompt) and isinstance(prompt[0], dict))


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
