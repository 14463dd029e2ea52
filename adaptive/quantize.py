"""Weights as 4 or 8 bit integers, in the layout of ONNX Runtime's MatMulNBits. Plain numpy."""

from __future__ import annotations

import numpy as np

BLOCK = 32  # neighbouring inputs that share a scale and a zero point
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # ranges tried per block, relative to that of its weights


def quantize(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (packed, scales, zero points): weight = (integer - zero point) * scale, block by block.

    Of several ranges per block the one with the least squared error is kept; a little clipping often beats none.

    Args:
        weight: [rows, inputs].
        bits: 4 or 8.

    Returns:
        packed [rows, blocks, BLOCK * bits / 8] uint8 (at 4 bits the earlier weight in the low half of a byte), scales
        [rows, blocks] float32, and zero points [rows, ceil(blocks * bits / 8)] uint8, packed likewise.
    """
    assert bits in (4, 8), bits
    rows, inputs = weight.shape
    count = -(-inputs // BLOCK)
    packed = np.empty((rows, count, BLOCK * bits // 8), np.uint8)
    scales, zeros = np.empty((rows, count), np.float32), np.empty((rows, count), np.uint8)
    step = max(1, 2**21 // max(inputs, 1))
    for start in range(0, rows, step):  # a few rows at a time: the candidates are as large as the weights
        part = np.asarray(weight[start : start + step], np.float32)
        part = np.pad(part, ((0, 0), (0, count * BLOCK - inputs))).reshape(-1, count, BLOCK)
        whole, scales[start : start + step], zeros[start : start + step] = _search(part, bits)
        packed[start : start + step] = _pack(whole, bits)
    return packed, scales, _pack(np.pad(zeros, ((0, 0), (0, count % 2))), bits) if bits == 4 else zeros


def restore(packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    """Returns the float32 weights [rows, inputs] that `quantize` stored."""
    whole = _unpack(packed, bits).astype(np.float32)
    zero = _unpack(zeros, bits)[:, : scales.shape[1], None].astype(np.float32)
    return ((whole - zero) * scales[..., None]).reshape(len(packed), -1)[:, :inputs]


def quantize_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (integers [rows, width] int8, scales [rows] float32) of a table whose rows are read one by one."""
    scales = np.abs(table).max(axis=1).astype(np.float32) / 127
    scales[scales == 0] = 1
    return np.rint(table / scales[:, None]).astype(np.int8), scales


def _search(part: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns integers, scales and zero points of weights [rows, blocks, BLOCK]; the latter two [rows, blocks]."""
    most = 2**bits - 1
    low, high = np.minimum(part.min(-1), 0), np.maximum(part.max(-1), 0)
    best = np.full(low.shape, np.inf, np.float32)
    whole, scales, zeros = np.zeros(part.shape, np.uint8), np.ones_like(low), np.zeros(low.shape, np.uint8)
    for shrink in SHRINK if bits == 4 else SHRINK[:1]:
        scale = (high - low) * np.float32(shrink / most)
        scale[scale == 0] = 1
        zero = np.clip(np.rint(-low * np.float32(shrink) / scale), 0, most)
        tried = np.clip(np.rint(part / scale[..., None]) + zero[..., None], 0, most)
        centred = tried - zero[..., None]
        # The scale that fits these integers best; one more step of least squares.
        square = np.square(centred).sum(-1)
        scale = np.where(square > 0, (centred * part).sum(-1) / np.maximum(square, 1), scale).astype(np.float32)
        error = np.square(centred * scale[..., None] - part).sum(-1)
        better = error < best
        best[better], scales[better], zeros[better] = error[better], scale[better], zero[better]
        whole[better] = tried[better]
    return whole, scales, zeros


def _pack(whole: np.ndarray, bits: int) -> np.ndarray:
    whole = whole.astype(np.uint8)
    return whole if bits == 8 else whole[..., ::2] | whole[..., 1::2] << 4


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
