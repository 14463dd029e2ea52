"""Weights as 4 or 8 bit integers, in the layout of ONNX Runtime's MatMulNBits. Plain numpy."""

from __future__ import annotations

import numpy as np

BLOCK = 32  # neighbouring inputs that share a scale
DAMPING = 0.01  # of the Gram matrix, relative to its mean diagonal
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # ranges tried per block, relative to that of its weights


def quantize(weight: np.ndarray, bits: int, gram: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns (packed, scales): weight = (integer - 2^(bits - 1)) * scale, block by block.

    Of several scales per block, of either sign, the one with the least squared error is kept: a little clipping often
    beats none, and a negative scale reaches one step further on the other side.

    Args:
        weight: [rows, inputs].
        bits: 4 or 8.
        gram: [inputs, inputs] of what is multiplied. With it, 4 bits are chosen one input after the other, and what
            rounding did to an input is made up for by the ones behind it (GPTQ, Frantar et al. 2022, section 3).

    Returns:
        packed [rows, blocks, BLOCK * bits / 8] uint8 (at 4 bits the earlier weight in the low half of a byte), and
        scales [rows, blocks] float32.
    """
    assert bits in (4, 8), bits
    rows, inputs = weight.shape
    count = -(-inputs // BLOCK)
    packed, scales = np.empty((rows, count, BLOCK * bits // 8), np.uint8), np.empty((rows, count), np.float32)
    step = max(1, 2**21 // inputs)
    factor = None if gram is None or bits != 4 else _factor(gram, count * BLOCK)
    for start in range(0, rows, step):  # a few rows at a time: the candidates are as large as the weights
        part = np.asarray(weight[start : start + step], np.float32)
        part = np.pad(part, ((0, 0), (0, count * BLOCK - inputs))).reshape(-1, count, BLOCK)
        whole, scales[start : start + step] = _search(part, bits) if factor is None else _in_turn(part, factor)
        packed[start : start + step] = whole if bits == 8 else whole[..., ::2] | whole[..., 1::2] << 4
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


def _factor(gram: np.ndarray, size: int) -> np.ndarray:
    """Returns the upper Cholesky factor [size, size] of the inverse of a Gram matrix (Frantar et al. 2022, section
    3.3), with what stands for padding beyond."""
    inputs, gram = len(gram), gram.astype(np.float64)
    gram = gram + np.eye(inputs) * max(DAMPING * float(np.diag(gram).mean()), 1e-9)
    factor = np.eye(size, dtype=np.float32)
    factor[:inputs, :inputs] = np.linalg.cholesky(np.linalg.inv(gram)).T
    return factor


def _in_turn(part: np.ndarray, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns integers [rows, blocks, BLOCK] and scales [rows, blocks] of weights [rows, blocks, BLOCK], rounded input
    by input."""
    rows, count, _ = part.shape
    left = np.ascontiguousarray(part.reshape(rows, -1).T)  # input by input, what is still to be rounded
    whole, scales = np.empty((count * BLOCK, rows), np.uint8), np.empty((count, rows), np.float32)
    for block in range(count):
        first, end = block * BLOCK, (block + 1) * BLOCK
        scale = scales[block] = _search(np.ascontiguousarray(left[first:end].T)[:, None], 4)[1][:, 0]
        wrong = np.empty((BLOCK, rows), np.float32)
        for index, at in enumerate(range(first, end)):
            centred = np.clip(np.rint(left[at] / scale), -8, 7)
            whole[at] = centred + 8
            wrong[index] = (left[at] - centred * scale) / factor[at, at]
            left[at + 1 : end] -= factor[at, at + 1 : end, None] * wrong[index]
        left[end:] -= factor[first:end, end:].T @ wrong
    return np.ascontiguousarray(whole.T).reshape(part.shape), np.ascontiguousarray(scales.T)
