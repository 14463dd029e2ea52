"""Weights as 4 or 8 bit integers, in the layout of ONNX Runtime's MatMulNBits. Plain numpy."""

from __future__ import annotations

import numpy as np

BLOCK = 32  # neighbouring inputs that share a scale


def quantize(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (packed, scales): weight = (integer - 2^(bits - 1)) * scale, block by block.

    The largest weight of a block gets the lowest integer, whose sign is the scale's: there is one more of these than of
    positive ones, and it is the largest weights that must not be clipped.

    Args:
        weight: [rows, inputs].
        bits: 4 or 8.

    Returns:
        packed [rows, blocks, BLOCK * bits / 8] uint8 (at 4 bits the earlier weight in the low half of a byte), and
        scales [rows, blocks] float32.
    """
    assert bits in (4, 8), bits
    rows, inputs = weight.shape
    count, middle = -(-inputs // BLOCK), 2 ** (bits - 1)
    packed, scales = np.empty((rows, count, BLOCK * bits // 8), np.uint8), np.empty((rows, count), np.float32)
    step = max(1, 2**18 // inputs)
    for start in range(0, rows, step):  # a few rows at a time, which stay in a CPU's cache
        part = np.asarray(weight[start : start + step], np.float32)
        part = np.pad(part, ((0, 0), (0, count * BLOCK - inputs))).reshape(-1, count, BLOCK)
        largest = np.take_along_axis(part, np.abs(part).argmax(-1)[..., None], -1)[..., 0]
        scale = np.where(largest == 0, np.float32(1), largest / np.float32(-middle))
        whole = np.clip(np.rint(part / scale[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
        packed[start : start + step] = whole if bits == 8 else whole[..., ::2] | whole[..., 1::2] << 4
        scales[start : start + step] = scale
    return packed, scales


def restore(packed: np.ndarray, scales: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    """Returns the float32 weights [rows, inputs] that `quantize` stored."""
    whole = packed
    if bits == 4:
        whole = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], BLOCK)
    return ((whole.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]).reshape(len(packed), -1)[:, :inputs]


def quantize_rows(table: np.ndarray, most: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Returns (integers [rows, width] int8 from -most to most, scales [rows] float32) of a table whose rows have a
    scale each."""
    scales = np.abs(table).max(axis=1).astype(np.float32) / most
    scales[scales == 0] = 1
    return np.rint(table / scales[:, None]).astype(np.int8), scales
