"""ONNX graphs of segments, heads and fills, built from recipes.

GroupQueryAttention writes its keys and values into the buffers that it reads them from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adaptive.onnx_graph import FLOAT, INT32, INT64, MS, Graph
from adaptive.recipes import Block, Linear, Norm, Shape


def cache_inputs(graph: Graph, shape: Shape, kinds: int) -> None:
    """Declares what attention needs: how far the tokens reach, and the rotary tables."""
    graph.input("last", INT32, 1)
    graph.input("total", INT32, 1)
    for kind in range(kinds):
        graph.input(f"cos_{kind}", FLOAT, "positions", "turned")
        graph.input(f"sin_{kind}", FLOAT, "positions", "turned")


def attention(graph: Graph, normed: str, block: Block, shape: Shape, slot: int) -> str:
    """Returns what attention adds to the state; keys and values number `slot` are read and written in place."""
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    query, key, value = graph.linear(normed, block.qkv), "", ""
    if block.q_norm is not None:
        query, key, value = graph.split(query, wide, narrow, narrow)
        query = _per_head(graph, query, block.q_norm, shape.heads, shape.head_dim)
        key = _per_head(graph, key, block.k_norm, shape.kv_heads, shape.head_dim)
    context = _attend(graph, [query, key, value], block, shape, slot, turned=True)
    return graph.linear(context, block.out)


def borrowed_attention(graph: Graph, normed: str, block: Block, shape: Shape, slot: int) -> str:
    """Returns what attention adds to the newest token's state, over keys and values that are there already.

    The operator insists on writing the token's own: it gets those that lie in the buffers, turned already.
    """
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    bias = None if block.qkv.bias is None else block.qkv.bias[:wide]
    query = graph.linear(normed, Linear(block.qkv.weight[:wide], bias))
    if block.q_norm is not None:
        query = _per_head(graph, query, block.q_norm, shape.heads, shape.head_dim)
    tables = (f"cos_{block.rope}", f"sin_{block.rope}")
    query = graph.node("RotaryEmbedding", query, "position", *tables, domain=MS, num_heads=shape.heads, **shape.rotary)
    own = [graph.input(f"{name}_now_{slot}", FLOAT, 1, 1, narrow) for name in ("key", "value")]
    return graph.linear(_attend(graph, [query, *own], block, shape, slot, turned=False), block.out)


def _per_head(graph: Graph, x: str, norm: Norm, heads: int, width: int) -> str:
    return graph.reshape(graph.norm(graph.reshape(x, 0, 0, heads, width), norm), 0, 0, heads * width)


def _attend(graph: Graph, packed: list[str], block: Block, shape: Shape, slot: int, turned: bool) -> str:
    past = [graph.input(f"past_{name}_{slot}", FLOAT, 1, shape.kv_heads, "room", shape.head_dim)
            for name in ("key", "value")]  # fmt: skip
    tables = [f"cos_{block.rope}", f"sin_{block.rope}"] if turned else []
    present = (f"key_{slot}", f"value_{slot}")
    settings = dict(num_heads=shape.heads, kv_num_heads=shape.kv_heads, scale=shape.scale, do_rotary=int(turned))
    settings |= {"softcap": shape.softcap} if shape.softcap else {}
    settings |= {"local_window_size": block.window} if block.window else {}
    context = graph.node("GroupQueryAttention", *packed, *past, "last", "total", *tables, domain=MS,
                         names=(f"context_{slot}", *present), **settings)[0]  # fmt: skip
    for name in present:
        graph.output(name, name, FLOAT, 1, shape.kv_heads, "room", shape.head_dim)
    return context


def run_block(
    graph: Graph, state: str, normed: str | None, block: Block, shape: Shape, slot: int, attend=attention
) -> tuple[str, str]:
    """Returns (state, added): the state before the MLP, and what the MLP adds to it.

    They are left apart so that the next norm can add them in one pass.
    """
    added = attend(graph, normed or graph.norm(state, block.norm), block, shape, slot)
    if block.after is not None:
        added = graph.norm(added, block.after)
    normed, state = graph.add_norm(state, added, block.mlp.norm)
    added = graph.gated(normed, block.mlp)
    return state, added if block.mlp.after is None else graph.norm(added, block.mlp.after)


def run_blocks(graph: Graph, state: str, blocks, shape: Shape, first: int, attend=attention) -> tuple[str, str]:
    """Returns (state, added) after blocks that keep their keys and values in slots from `first` on."""
    added = None
    for slot, block in enumerate(blocks, start=first):
        normed = None
        if added is not None:
            normed, state = graph.add_norm(state, added, block.norm)
        state, added = run_block(graph, state, normed, block, shape, slot, attend)
    return state, added


def segment(
    path: Path,
    blocks,
    shape: Shape,
    first: int,
    kinds: int,
    bits: int,
    gate: tuple | None = None,
    last: Norm | None = None,
) -> None:
    """Writes the graph of a segment: state [1, tokens, hidden] in, state out, K/V in place.

    A call takes longer than a gate or a norm: they are part of the segment that they follow.

    Args:
        path: of the graph.
        blocks: recipes of the blocks, shallowest first.
        shape: of all blocks.
        first: index of the first block.
        kinds: number of rotary tables.
        bits: of the weights.
        gate: (norm, layers) of a learned gate, Gelu between its layers, whose logit [1, tokens, 1] is another output.
        last: the final norm, whose normed state is another output.
    """
    graph = Graph(path, bits)
    graph.input("state", FLOAT, 1, "tokens", shape.hidden)
    cache_inputs(graph, shape, kinds)
    state, added = run_blocks(graph, "state", blocks, shape, first)
    out = graph.node("Add", state, added, names=("out",))
    graph.output(out, "out", FLOAT, 1, "tokens", shape.hidden)
    if last is not None:
        graph.output(graph.norm(out, last), "normed", FLOAT, 1, "tokens", shape.hidden)
    if gate is not None:
        norm, layers = gate
        x = graph.norm(out, norm)
        for index, layer in enumerate(layers):
            x = graph.linear(x if index == 0 else graph.node("Gelu", x, domain=MS), layer, exact=True)
        graph.output(x, "logit", FLOAT, 1, "tokens", 1)
    graph.save()


def head(
    path: Path,
    norm: Norm,
    shape: Shape,
    bits: int,
    down_up: tuple | None = None,
    mlps=(),
    rows: tuple | None = None,
    filled: tuple | None = None,
) -> None:
    """Writes the graph of a head without attention: state [1, tokens, hidden] -> normed state for the vocabulary.

    Args:
        path: of the graph.
        norm: at its end.
        shape: of the blocks.
        bits: of the weights.
        down_up: low-rank residual adapter, if it has one.
        mlps: residual MLPs.
        rows: (`Linear`, softcap) of vocabulary rows of its own; then it gives their logits in place of the normed
            state, as calls take time.
        filled: what `fill_outputs` takes, for K/V of skipped blocks in the same call; then for one token.
    """
    graph = Graph(path, bits)
    state = graph.input("state", FLOAT, 1, 1 if filled else "tokens", shape.hidden)
    if filled is not None:
        fill_outputs(graph, shape, *filled)
    if down_up is not None:
        state = graph.node("Add", state, graph.linear(graph.linear(state, down_up[0]), down_up[1]))
    added = None
    for mlp in mlps:
        if added is None:
            normed = graph.norm(state, mlp.norm)
        else:
            normed, state = graph.add_norm(state, added, mlp.norm)
        added = graph.gated(normed, mlp)
    normed = graph.norm(state, norm) if added is None else graph.add_norm(state, added, norm)[0]
    if rows is None:
        graph.output(normed, "normed", FLOAT, 1, "tokens", shape.hidden)
    else:
        logits = _cap(graph, graph.linear(normed, rows[0]), rows[1])
        graph.output(logits, "logits", FLOAT, 1, "tokens", len(rows[0].weight))
    graph.save()


def block_features(path: Path, norm: Norm, blocks, shape: Shape, first: int, kinds: int, bits: int, own: bool) -> None:
    """Writes the graph of a block head, with K/V of its own in slots from `first` on, or on the backbone's there."""
    graph = Graph(path, bits)
    graph.input("state", FLOAT, 1, "tokens" if own else 1, shape.hidden)
    cache_inputs(graph, shape, kinds)
    if not own:
        graph.input("position", INT64, 1, 1)
    state, added = run_blocks(graph, "state", blocks, shape, first, attention if own else borrowed_attention)
    graph.output(graph.add_norm(state, added, norm)[0], "normed", FLOAT, 1, "tokens", shape.hidden)
    graph.save()


def vocabulary(path: Path, head: Linear, shape: Shape, bits: int, softcap: float | None) -> None:
    """Writes the graph of vocabulary rows: normed state [1, tokens, hidden] -> logits [1, tokens, entries]."""
    graph = Graph(path, bits)
    graph.input("normed", FLOAT, 1, "tokens", shape.hidden)
    logits = _cap(graph, graph.linear("normed", head), softcap)
    graph.output(logits, "logits", FLOAT, 1, "tokens", len(head.weight))
    graph.save()


def preview(path: Path, down: Linear, up: Linear, shape: Shape, bits: int) -> None:
    """Writes the graph of a screen: normed state [1, 1, hidden] -> previewed logits [1, 1, vocabulary].

    `bits`: 32, or fewer: then what is wide is stored in 8, so that the survivors stay those that were trained with.
    """
    graph = Graph(path, 32 if bits == 32 else 8)
    graph.input("normed", FLOAT, 1, 1, shape.hidden)
    scores = graph.linear(graph.linear("normed", down, exact=True), up)
    graph.output(scores, "logits", FLOAT, 1, 1, len(up.weight))
    graph.save()


def _cap(graph: Graph, logits: str, softcap: float | None) -> str:
    if softcap is None:
        return logits
    cap = graph.weight(np.array(softcap, np.float32))
    return graph.node("Mul", graph.node("Tanh", graph.node("Div", logits, cap)), cap)


def fill(path: Path, shape: Shape, bits: int, *filled) -> None:
    """Writes the graph that fills K/V of skipped blocks: state [1, 1, hidden] in; `filled`: see `fill_outputs`."""
    graph = Graph(path, bits)
    graph.input("state", FLOAT, 1, 1, shape.hidden)
    fill_outputs(graph, shape, *filled)
    graph.save()


def fill_outputs(graph: Graph, shape: Shape, blocks, fitted: Linear | None) -> None:
    """Adds what projects one token's input `state` to the K/V of skipped blocks (CALM, Schuster et al. 2022, section
    3.2), all in one product: output `filled` [1, keys and then values of all blocks, kv heads * head dim].

    Every block's norm divides by the same rms; what it multiplies by goes into the weights. Each little node costs as
    much as 50,000 weights, so that nothing is looked up or cut apart here: inputs are all rotary tables, cos and sin,
    and the `rows` of them [1, 2 * blocks] to turn keys and values by.

    Args:
        graph: with its input `state`.
        shape: of all blocks.
        blocks: recipes of those that are skipped.
        fitted: the map to all keys and then all values, in place of the blocks' own (`fills.Fill`).
    """
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    pieces: list[list[np.ndarray]] = [[], []]
    biases, norms, eps, ropes = [[], []], [], 0.0, []
    for block in blocks:
        ropes, eps = [*ropes, block.rope], block.norm.eps
        for part, (start, end) in enumerate(((wide, wide + narrow), (wide + narrow, wide + 2 * narrow))):
            pieces[part].append(block.qkv.weight[start:end] * block.norm.weight)
            if block.qkv.bias is not None:
                biases[part].append(block.qkv.bias[start:end])
        if block.k_norm is not None:
            norms.append(block.k_norm)
    bias = np.concatenate(biases[0] + biases[1]) if biases[0] else None
    ones = Norm(np.ones(shape.hidden, np.float32), eps)
    own = Linear(np.concatenate(pieces[0] + pieces[1]), bias)
    packed = graph.linear(graph.norm("state", ones), fitted or own)
    if norms:
        keys, values = graph.split(packed, len(ropes) * narrow, len(ropes) * narrow)
        keys = graph.reshape(keys, len(ropes), shape.kv_heads, shape.head_dim)
        keys = graph.norm(keys, Norm(np.ones(shape.head_dim, np.float32), norms[0].eps))
        keys = graph.node("Mul", keys, graph.weight(np.stack([norm.weight for norm in norms])[:, None]))
        packed = graph.node("Concat", graph.reshape(keys, 1, 1, len(ropes) * narrow), values, axis=-1)
    # The operator takes blocks for positions: each key has a row of the tables, and values one that turns nothing.
    graph.input("rows", INT64, 1, 2 * len(ropes))
    for name in ("cos", "sin"):
        graph.input(name, FLOAT, "all", "turned")
    graph.node("RotaryEmbedding", graph.reshape(packed, 1, 2 * len(ropes), narrow), "rows", "cos", "sin", domain=MS,
               names=("filled",), num_heads=shape.kv_heads, **shape.rotary)  # fmt: skip
    graph.output("filled", "filled", FLOAT, 1, 2 * len(ropes), narrow)
