"""Weights as 4 or 8 bit integers, in the layout of ONNX Runtime's MatMulNBits. Plain numpy."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK = 32  # neighbouring inputs that share a scale
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # ranges tried per block, relative to that of its weights


def quantize(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (packed, scales): weight = (integer - 2^(bits - 1)) * scale, block by block.

    Of several scales per block, of either sign, the one with the least squared error is kept: a little clipping often
    beats none, and a negative scale reaches one step further on the other side.

    Args:
        weight: [rows, inputs].
        bits: 4 or 8.

    Returns:
        packed [rows, blocks, BLOCK * bits / 8] uint8 (at 4 bits the earlier weight in the low half of a byte), and
        scales [rows, blocks] float32.
    """
    assert bits in (4, 8), bits
    rows, inputs = weight.shape
    count = -(-inputs // BLOCK)
    packed, scales = np.empty((rows, count, BLOCK * bits // 8), np.uint8), np.empty((rows, count), np.float32)
    step = max(1, 2**18 // inputs)

    def some(start: int) -> None:  # a few rows at a time: the candidates are as large as the weights
        part = np.asarray(weight[start : start + step], np.float32)
        part = np.pad(part, ((0, 0), (0, count * BLOCK - inputs))).reshape(-1, count, BLOCK)
        whole, scales[start : start + step] = _search(part, bits)
        packed[start : start + step] = whole if bits == 8 else whole[..., ::2] | whole[..., 1::2] << 4

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(some, range(0, rows, step)))
    return packed, scales


def restore(packed: np.ndarray, scales: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    """Returns the float32 weights [rows, inputs] that `quantize` stored."""
    whole = packed
    if bits == 4:
        whole = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], BLOCK)
    return ((whole.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]).reshape(len(packed), -1)[:, :inputs]


def quantize_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (integers [rows, width] int8, scales [rows] float32) of a table whose rows are read one by one."""
    scales = np.abs(table).max(axis=1).astype(np.float32) / 127
    scales[scales == 0] = 1
    return np.rint(table / scales[:, None]).astype(np.int8), scales


def _search(part: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns integers [rows, blocks, BLOCK] and scales [rows, blocks] of weights [rows, blocks, BLOCK]."""
    middle, reach = 2 ** (bits - 1), np.abs(part).max(-1)
    best = np.full(reach.shape, np.inf, np.float32)
    whole, scales = np.zeros(part.shape, np.uint8), np.ones_like(reach)
    for shrink in SHRINK if bits == 4 else SHRINK[:1]:
        for sign in (1, -1):
            scale = reach * np.float32(sign * shrink / middle)
            scale[scale == 0] = 1
            centred = np.clip(np.rint(part / scale[..., None]), -middle, middle - 1)
            # The scale that fits these integers best: least squares.
            square = np.square(centred).sum(-1)
            scale = np.where(square > 0, (centred * part).sum(-1) / np.maximum(square, 1), scale).astype(np.float32)
            error = np.square(centred * scale[..., None] - part).sum(-1)
            better = error < best
            best[better], scales[better] = error[better], scale[better]
            whole[better] = centred[better] + middle
    return whole, scales
