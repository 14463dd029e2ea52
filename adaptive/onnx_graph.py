"""An ONNX graph in the making: nodes, and weights in a file beside it that the runtime can map.

Activations are float32. Operators are ONNX Runtime's own where it has them; MatMulNBits multiplies 4 or 8 bit weights
(accuracy level 4: activations are quantized to 8 bits as well). It is for a token at a time: many are multiplied
several times as fast as whole numbers (`INTEGER` bits), for which CPUs have instructions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from adaptive.quantize import BLOCK, quantize, quantize_rows
from adaptive.recipes import MLP, Linear, Norm

MS = "com.microsoft"
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
TYPES = {"float32": FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "int64": INT64, "int32": INT32}
PAGE = 4096
INTEGER = 7  # bits: AVX2 adds two products in 16 bits, and 2 * 255 * 63 is the most that fits


class Graph:
    """An ONNX graph in the making.

    Args:
        path: of the .onnx file; weights go to the same name with .bin.
        bits: 4 or 8 for quantized weights, 32 for plain ones, `INTEGER` for products of many tokens in whole numbers.
        level: accuracy level of MatMulNBits: 4 quantizes activations, 1 leaves them alone.
    """

    def __init__(self, path: Path, bits: int, level: int = 4):
        self.path, self.bits, self.level = path, bits, level
        self.nodes, self.inputs, self.outputs, self.weights = [], [], [], []
        self.data = open(path.with_suffix(".bin"), "wb")
        self.count = 0
        self.whole: dict[str, tuple[str, str]] = {}  # what has been made whole numbers already
        self.zeros: str | None = None

    def input(self, name: str, kind: int, *dims: int | str) -> str:
        """Declares an input; returns its name."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, dims))
        return name

    def output(self, value: str, name: str, kind: int, *dims: int | str) -> None:
        """Declares `value` as an output called `name`."""
        if value != name:
            self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, dims))

    def node(self, op: str, *inputs: str, outs: int = 1, names: tuple = (), domain: str = "", **attributes):
        """Adds a node; returns the name of its output, or a list of `outs` names."""
        self.count += 1
        names = list(names) or [f"{op}_{self.count}_{index}" for index in range(outs)]
        self.nodes.append(
            helper.make_node(op, list(inputs), names, name=f"{op}_{self.count}", domain=domain, **attributes)
        )
        return names if len(names) > 1 else names[0]

    def weight(self, values: np.ndarray) -> str:
        """Adds a constant; large ones go to the file of weights."""
        values = np.ascontiguousarray(values)
        self.count += 1
        tensor = TensorProto(name=f"weight_{self.count}", data_type=TYPES[str(values.dtype)], dims=values.shape)
        if values.nbytes < 1024:
            tensor.raw_data = values.tobytes()
        else:
            self.data.write(b"\0" * (-self.data.tell() % PAGE))
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": f"{self.path.stem}.bin", "offset": self.data.tell(), "length": values.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self.data.write(values.data)
        self.weights.append(tensor)
        return tensor.name

    def save(self) -> None:
        """Writes the graph."""
        self.data.close()
        graph = helper.make_graph(self.nodes, self.path.stem, self.inputs, self.outputs, self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
        onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(self.path))
        if not self.path.with_suffix(".bin").stat().st_size:
            self.path.with_suffix(".bin").unlink()

    def linear(self, x: str, layer: Linear, exact: bool = False) -> str:
        """Multiplies `x` [.., in] by a layer's weights; `exact` leaves them in float32."""
        if self.bits == 32 or exact:
            out = self.node("MatMul", x, self.weight(layer.weight.T))
        elif self.bits == INTEGER:
            out = self._integer(x, layer.weight)
        else:
            rows, inputs = layer.weight.shape
            stored = [self.weight(part) for part in quantize(layer.weight, self.bits)]
            settings = dict(K=inputs, N=rows, bits=self.bits, block_size=BLOCK, accuracy_level=self.level)
            out = self.node("MatMulNBits", x, *stored, domain=MS, **settings)
        return out if layer.bias is None else self.node("Add", out, self.weight(layer.bias))

    def _integer(self, x: str, weight: np.ndarray) -> str:
        """Multiplies in whole numbers, which every CPU adds up alike: a scale per token, and one per row of weights."""
        whole, step = self._whole(x)
        rows, scales = quantize_rows(weight, 2 ** (INTEGER - 1) - 1)
        zero, factors = self.weight(np.array(128, np.uint8)), (self._number(1.0), self.weight(scales))
        out = self.node("MatMulIntegerToFloat", whole, self.weight(rows.T), *factors, zero, domain=MS)
        return self.node("Mul", out, step)

    def _whole(self, x: str) -> tuple[str, str]:
        """Returns (`x` [1, tokens, in] in whole numbers around 128, a token's step [1, tokens, 1]); made once for all
        that `x` is multiplied by."""
        if x not in self.whole:
            largest = self.node("ReduceMax", self.node("Abs", x), self.weight(np.array([-1], np.int64)), keepdims=1)
            step = self.node("Add", self.node("Mul", largest, self._number(1 / 127)), self._number(1e-30))
            if self.zeros is None:  # the operator wants one for each token
                tokens = self.node("Shape", x, start=1, end=2)
                self.zeros = self.node("Expand", self.weight(np.array([128], np.uint8)), tokens)
            whole = self.node("QuantizeLinear", x, self.reshape(step, -1), self.zeros, axis=1)
            self.whole[x] = whole, step
        return self.whole[x]

    def _number(self, value: float) -> str:
        return self.weight(np.array(value, np.float32))

    def norm(self, x: str, norm: Norm) -> str:
        """RMS norm over the last axis (Zhang & Sennrich 2019, eq. 4)."""
        return self.node("SimplifiedLayerNormalization", x, self.weight(norm.weight), axis=-1, epsilon=norm.eps)

    def add_norm(self, x: str, added: str, norm: Norm) -> tuple[str, str]:
        """Returns (normed, sum) of two states."""
        names = [f"normed_{self.count}", f"state_{self.count}"]
        self.node("SkipSimplifiedLayerNormalization", x, added, self.weight(norm.weight), domain=MS,
                  names=(names[0], "", "", names[1]), epsilon=norm.eps)  # fmt: skip
        return names[0], names[1]

    def reshape(self, x: str, *dims: int) -> str:
        """Reshapes; 0 keeps a dimension."""
        return self.node("Reshape", x, self.weight(np.array(dims, np.int64)))

    def split(self, x: str, *sizes: int, axis: int = -1) -> list[str]:
        """Cuts an axis into pieces."""
        return self.node("Split", x, self.weight(np.array(sizes, np.int64)), outs=len(sizes), axis=axis)

    def gated(self, normed: str, mlp: MLP) -> str:
        """Returns down(act(gate) * up) of a normed state (Shazeer 2020, eq. 6)."""
        if self.bits == INTEGER:  # a copy of many tokens costs more than another call
            gate, up = (self.linear(normed, part) for part in mlp.gate_up.halves())
        else:
            half = len(mlp.gate_up.weight) // 2
            gate, up = self.split(self.linear(normed, mlp.gate_up), half, half)
        act = (
            self.node("QuickGelu", gate, domain=MS, alpha=1.0)  # with alpha 1 this is SiLU
            if mlp.act == "silu"
            else self.node("Gelu", gate, approximate="tanh")
        )
        return self.linear(self.node("Mul", act, up), mlp.down)
