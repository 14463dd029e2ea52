"""Long prompts, read by graphs of their own in whole numbers."""

import numpy as np
import pytest
from test_export import PARSER, export, made, main, prompt, tokenizer

onnxruntime = pytest.importorskip("onnxruntime")

from adaptive import session  # noqa: E402
from adaptive.onnx_graph import FLOAT, INTEGER, Graph  # noqa: E402
from adaptive.recipes import Linear  # noqa: E402
from adaptive.runtime import Runtime  # noqa: E402


def test_products_are_sums_of_whole_numbers(tmp_path):
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((48, 64), (1, 9, 64)))
    weight[3], weight[5], weight[6] = 0, 2, -2
    x[0, 2], x[0, 3], x[0, 4], x[0, 5] = 0, 7, -7, 1e4 * x[0, 5]  # with rows 5 and 6 the largest sums that there are
    graph = Graph(tmp_path / "graph.onnx", INTEGER)
    graph.input("x", FLOAT, 1, "tokens", 64)
    graph.output(graph.linear("x", Linear(weight, None)), "y", FLOAT, 1, "tokens", 48)
    graph.save()
    (found,) = onnxruntime.InferenceSession(tmp_path / "graph.onnx").run(None, {"x": x})
    scales = np.where(np.abs(weight).max(1) == 0, 1, np.abs(weight).max(1) / 63)
    steps = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / 127
    whole = np.rint(x / steps), np.rint(weight / scales[:, None])
    assert np.abs(whole[0]).max() == 127 and np.abs(whole[1]).max() == 63
    np.testing.assert_allclose(found, whole[0] @ whole[1].T * scales * steps, rtol=1e-5, atol=1e-6)
    assert np.corrcoef(found.ravel(), (x @ weight.T).ravel())[0, 1] > 0.999


def test_halves_are_the_layer_cut_in_two():
    rng = np.random.default_rng(0)
    for bias in (None, rng.standard_normal(6)):
        layer, x = Linear(rng.standard_normal((6, 4)), bias), rng.standard_normal((3, 4))
        whole, *halves = (x @ part.weight.T + (0 if bias is None else part.bias) for part in (layer, *layer.halves()))
        np.testing.assert_allclose(np.concatenate(halves, 1), whole)


def read(runtime: Runtime, ids: list[int], keep: bool = False) -> np.ndarray:
    """K/V of a prompt, and the states that exits were left."""
    one = session.Session(runtime, len(ids) + 1)
    one.prefill(ids, keep)
    return np.concatenate([part.ravel() for part in (one.kv, *one.states[1:], *one.kept.values())])


@pytest.mark.parametrize(("family", "kind"), [("llama", "block"), ("qwen3", "mixed"), ("gemma3", "norm")])
def test_a_long_prompt_leaves_what_a_short_one_does(family, kind, tmp_path, monkeypatch):
    model, ids = made(family, kind), prompt(length=11)
    folders = {name: export(model, tmp_path / name, name, tokenizer()) for name in ("fp32", "int8", "int4")}
    runtimes = {name: Runtime.load(folder, threads=1) for name, folder in folders.items()}
    plain = {name: read(runtime, ids) for name, runtime in runtimes.items()}
    monkeypatch.setattr(session, "MANY", 11)
    monkeypatch.setattr(session, "CHUNK", 4)
    let_go = []
    monkeypatch.setattr(session, "forget", let_go.append)
    assert np.array_equal(read(runtimes["int8"], ids[:10]), read(runtimes["int8"], ids[:10], keep=True))
    assert not any("prompt_0" in runtime.graphs for runtime in runtimes.values())
    let_go.clear()
    near = {name: np.corrcoef(read(runtime, ids), plain["fp32"])[0, 1] for name, runtime in runtimes.items()}
    assert len(let_go) == 3
    let_go.clear()
    assert np.array_equal(read(runtimes["int4"], ids), read(runtimes["int4"], ids)) and not let_go, "once, when loaded"
    assert read(runtimes["fp32"], ids).any() and len(let_go) == 1, "every time, where they are decoded with"
    assert "prompt_0" in runtimes["int4"].graphs and "prompt_0" not in runtimes["fp32"].graphs
    assert near["fp32"] > 1 - 1e-6 and 0.99 < near["int8"] < 1 - 1e-6
    assert near["int4"] > np.corrcoef(plain["int4"], plain["fp32"])[0, 1], "finer than 4 bits"


def test_a_compact_folder_does_without(tmp_path, monkeypatch):
    model = made()
    model.save_pretrained(tmp_path / "run")
    tokenizer().save_pretrained(tmp_path / "run")
    main(PARSER.parse_args([str(tmp_path / "run"), str(tmp_path / "small"), "--compact"]))
    export(model, tmp_path / "large", "int4", tokenizer())
    small, large = ({path.name for path in (tmp_path / name).iterdir()} for name in ("small", "large"))
    assert small < large and all(name.startswith("prompt_") for name in large - small)
    monkeypatch.setattr(session, "MANY", 4)
    runtimes = [Runtime.load(tmp_path / name, threads=1) for name in ("small", "large")]
    answers = [[token.id for token in runtime.generate(prompt(), 8)] for runtime in runtimes]
    assert len(answers[0]) == 8 and not [name for name in runtimes[0].graphs if name.startswith("prompt_")]
