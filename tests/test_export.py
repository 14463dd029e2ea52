"""An exported folder against the model that it came from."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

import adaptive.folder  # noqa: E402
from adaptive import outcomes, parts, session  # noqa: E402
from adaptive.config import ExitConfig  # noqa: E402
from adaptive.export import PARSER, chat_template, export, main  # noqa: E402
from adaptive.folder import Folder  # noqa: E402
from adaptive.model import EarlyExitModel  # noqa: E402
from adaptive.policy import ExitPolicy  # noqa: E402
from adaptive.quantize import BLOCK, quantize, quantize_rows, restore  # noqa: E402
from adaptive.recipes import FAMILIES  # noqa: E402
from adaptive.runtime import Runtime  # noqa: E402
from adaptive.texts import Chat  # noqa: E402

SHAPE = dict(head_dim=16, hidden_size=64)  # the rotary step of GroupQueryAttention wants heads of 16, 32, ...
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<s>be good</s>\n{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)
KINDS = {
    "norm": dict(head="norm"),
    "mixed": dict(head=["linear", "mlp"], layers=2, shortlist=[None, 40], gate="mlp"),
    "block": dict(head="block"),
    "shared": dict(head="block", head_kv="shared", layers=2),
    "screen": dict(head=["linear_mlp", "norm"], shortlist=24, screen=8),
    "last": dict(depths=[2, 4], head="norm", shortlist=40),
    "max_prob": dict(head="norm", gate="max_prob"),
    "margin": dict(head="norm", shortlist=30, gate="margin"),
    "entropy": dict(head="norm", gate="entropy"),
    "similarity": dict(head="norm", gate="similarity"),
}


def made(family: str = "llama", kind: str = "norm", **overrides) -> EarlyExitModel:
    """A tiny model whose exits disagree with its full depth, and whose gates are of two minds."""
    config = ExitConfig(**{"depths": [2, 3], **KINDS[kind]})
    model = EarlyExitModel.from_backbone(tiny(family, **SHAPE, **overrides), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.exits.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for buffer in model.exits.fills.buffers():
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one word per id."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def prompt(seed: int = 0, length: int = 9) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def compare(model: EarlyExitModel, runtime: Runtime, policy, seed: int = 0) -> float:
    """Asserts the same tokens, exits, heads and catching up; returns the mean depth."""
    ids = prompt(seed)
    theirs = model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False, policy=policy, return_dict_in_generate=True
    )
    tokens = list(runtime.generate(ids, 24, policy=policy))
    trace = runtime.trace(tokens, len(ids))
    assert [token.id for token in tokens] == theirs.sequences[0, len(ids) :].tolist()
    for name in ("taken", "context", "headed", "caught_up", "prompt"):
        assert np.array_equal(getattr(trace, name), getattr(theirs.trace, name)), name
    np.testing.assert_allclose(trace.scores, theirs.trace.scores, atol=2e-5)
    assert [token.depth for token in tokens] == trace.depth[0].tolist()
    return trace.mean_depth


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_and_gate_leaves_where_torch_leaves(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "WHOLE", 0)
    model = made(kind=kind)
    runtime = Runtime.load(export(model, tmp_path / "out", "fp32", tokenizer()), threads=1)
    scores = [token.step.scores for token in runtime.generate(prompt(), 24, policy=[1e9, 1e9])]
    middle = np.nanmedian(np.array(scores), axis=0).tolist()
    policies = ([0, 0], middle, [math.inf] * 2, [math.inf, middle[1]])
    depths = [compare(model, runtime, policy, seed) for seed, policy in enumerate(policies)]
    assert depths[0] == 2 and 2 < depths[1] < 4 and depths[2] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_leaves_where_torch_leaves(family, tmp_path, monkeypatch):
    kind = {"gemma3_text": "block", "qwen3": "shared"}.get(family, "norm")
    model = made(family.removesuffix("_text"), kind)
    runtime = Runtime.load(export(model, tmp_path / "out", "fp32", tokenizer()), threads=1)
    scores = [token.step.scores for token in runtime.generate(prompt(), 24, policy=[1e9, 1e9])]
    middle = np.nanmedian(np.array(scores), axis=0).tolist()
    assert 2 < compare(model, runtime, middle) < 4
    # Longer than a chunk of the prefill, and than any window.
    monkeypatch.setattr(session, "CHUNK", 32)
    ids = prompt(length=100)
    out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert [token.id for token in runtime.generate(ids, 4, policy="full")] == out[0, 100:].tolist()


def test_scaled_rotary_tables_and_biases(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    model = made(rope_parameters=rope, attention_bias=True, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    compare(model, Runtime.load(export(model, tmp_path / "out", "fp32", tokenizer()), threads=1), [0.5, 0.5])


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["mixed", "screen"])
def test_quantized_folders(precision, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "WHOLE", 0)
    model = made(kind=kind)
    out = export(model, tmp_path / "out", precision, tokenizer())
    runtime = Runtime.load(out, threads=1)
    for policy in ("full", [0, 0], [math.inf, 0]):
        assert len(list(runtime.generate(prompt(), 12, policy=policy))) == 12
    if kind == "screen":  # the survivors' logits are those that the whole head gives them
        state = np.random.default_rng(0).standard_normal((1, 1, 64)).astype(np.float32)
        whole = runtime.graphs["vocabulary"].run(["logits"], {"normed": state})[0].ravel()
        ids = np.arange(0, VOCAB, 3)
        found = session.Session(runtime, 4)._exact("head", ids, state.ravel())
        assert np.abs(found - whole[ids]).max() < 0.03 * np.abs(whole).max()
    if precision == "int8":
        ids = prompt(length=40)
        nll = outcomes.judge(Folder(out), [ids[:10]], [ids[10:]])[1]
        assert np.abs(nll - outcomes.judge(model, [ids[:10]], [ids[10:]])[1]).mean() < 0.1


def test_a_screen_that_would_not_pay_is_left_out(tmp_path):
    model = made(kind="screen")
    runtime = Runtime.load(export(model, tmp_path / "out", "fp32", tokenizer()), threads=1)
    assert not {"preview.onnx", "head.npy"} & set(runtime.manifest["files"])
    exits = runtime.manifest["costs"]["exits"]
    assert [exit["vocab"] for exit in exits] == [model.costs.shape["vocab"]] * 2
    whole = made(kind="screen")
    whole.exits.screen, whole.exits.sizes = None, [None, None]
    compare(whole, runtime, [0.0, 0.0])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="says what memory is used for")
def test_weights_are_in_memory_once(tmp_path):
    folder = export(made(), tmp_path / "out", "int4", tokenizer())
    runtime, resident, count = Runtime.load(folder, threads=1), 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0].islower() or line[0].isdigit():
            ours = line.endswith(".bin") and str(folder) in line
            count += ours
        elif line.startswith("Rss:") and ours:
            resident += int(line.split()[1])
    assert count and not resident
    assert len(list(runtime.generate(prompt(), 3))) == 3


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_close_and_multiplied_as_stored(bits, tmp_path):
    from adaptive.onnx_graph import FLOAT, Graph
    from adaptive.recipes import Linear

    generator = np.random.default_rng(0)
    weight = generator.standard_normal((48, 3 * BLOCK)).astype(np.float32)
    weight[0] = 0
    weight[1] = np.abs(weight[1]) + 1
    stored = quantize(weight, bits)
    back = restore(*stored, bits, weight.shape[1])
    assert np.abs(back - weight).mean() < (0.1 if bits == 4 else 0.006) and not back[0].any()
    graph = Graph(tmp_path / "g.onnx", bits, level=1)
    graph.input("x", FLOAT, 2, weight.shape[1])
    graph.output(graph.linear("x", Linear(weight)), "y", FLOAT, 2, 48)
    graph.save()
    x = generator.standard_normal((2, weight.shape[1])).astype(np.float32)
    y = onnxruntime.InferenceSession(str(tmp_path / "g.onnx")).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, x @ back.T, atol=1e-4)
    rows, scales = quantize_rows(weight)
    assert np.abs(rows * scales[:, None] - weight).max() <= scales.max() / 2 + 1e-6


def test_refusals_name_all_that_is_missing(tmp_path):
    model = EarlyExitModel.from_backbone(tiny("gpt2"), ExitConfig(depths=[2]))
    with pytest.raises(ValueError, match="'int3' is not one of .*; family `gpt2` has no exported form"):
        export(model, tmp_path / "out", "int3", tokenizer())
    assert not list(tmp_path.iterdir())


def test_the_certificate_is_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptive.folder, "CALL", 0)  # next to a toy's weights it is all that counts
    model, asked = made(), [prompt(seed, 4 + seed % 5) for seed in range(24)]
    settings = dict(prompts=asked[8:], selection=asked[:8], budget=0.9, max_new_tokens=10)
    out = export(model, tmp_path / "out", "fp32", tokenizer(), calibrate=settings)
    runtime, folder = Runtime.load(out, threads=1), Folder(out)
    certificate = runtime.manifest["certificate"]
    assert certificate["model_digest"] == folder.digest and "onnxruntime" in certificate["versions"]
    assert f"at most {certificate['certified']:.4f}" in (out / "README.md").read_text()
    assert any(token.depth < 4 for seed in range(5) for token in runtime.generate(prompt(seed), 20))
    cheap = runtime.policy("budget=0.9")
    assert isinstance(cheap, ExitPolicy)
    # What calibration sees of the folder is what it sees of the model: answers, scores, regrets, the judge.
    for probe in (False, True):
        policy = ExitPolicy((math.inf,) * 2) if probe else cheap
        ours, ours_trace = outcomes.answer(folder, asked, policy, 10, batch_size=5, probe=probe)
        theirs, theirs_trace = outcomes.answer(model, asked, policy, 10, batch_size=5, probe=probe)
        assert ours == theirs and np.array_equal(ours_trace.taken, theirs_trace.taken)
        if probe:
            np.testing.assert_allclose(ours_trace.regret, theirs_trace.regret, atol=1e-4)
    for mine, torchs in zip(outcomes.judge(folder, asked, ours), outcomes.judge(model, asked, theirs)):
        np.testing.assert_allclose(mine, torchs, atol=1e-4)


def test_exits_that_save_no_time_are_closed(tmp_path, monkeypatch):
    asked = [prompt(seed, 4 + seed % 5) for seed in range(24)]
    for call, open_exits in ((0, True), (10**9, False)):
        monkeypatch.setattr(adaptive.folder, "CALL", call)
        settings = dict(prompts=asked[8:], selection=asked[:8], risk=0.95, delta=0.5, max_new_tokens=6)
        out = export(made(), tmp_path / "out", "fp32", tokenizer(), calibrate=settings)
        found = json.loads((out / "manifest.json").read_text())["certificate"]
        assert any(threshold is not None for threshold in found["thresholds"]) == open_exits == (found["saved"] > 0)
        assert ("No exit is open" in (out / "README.md").read_text()) != open_exits


def test_chat_templates_are_taken_apart_or_kept():
    words = tokenizer()
    assert chat_template(words) is None
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": " c\n"},
    ]
    words.chat_template = CHATML
    pieces = chat_template(words)
    assert set(pieces) == {"roles", "start", "answer"} and pieces["answer"] == "<assistant>"
    for messages in (talk, talk[:1], [{"role": "system", "content": "s"}, *talk]):
        assert Chat(pieces).render(messages) == words.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    words.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    kept = chat_template(words)
    assert "jinja" in kept and "c" in Chat(kept).render(talk)
    with pytest.raises(ValueError, match="roles among"):
        Chat(pieces).render([{"role": "robot", "content": "beep"}])


FULL = (  # of what transformers offers to templates
    "{{ bos_token }}{{ strftime_now('%Y') }}{% if tools is not none %}tools{% endif %}"
    "{% for message in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message | tojson }}{% endgeneration %}"
    "{% else %}{{ message['content'] | tojson(indent=1) }}{% endif %}{% endfor %}"
)


def test_kept_chat_templates_write_what_transformers_writes(monkeypatch, caplog):
    words, talk = tokenizer(), [{"role": "user", "content": "<é> & 'x'"}, {"role": "assistant", "content": '"<b>"'}]
    words.bos_token = "w1"
    for template in (FULL, CHATML.replace("{% for", "{{ strftime_now('%Y') }}{% for")):  # the latter could be pieces
        words.chat_template = {"default": template, "other": ""}
        kept = chat_template(words)
        assert kept == {"jinja": template, "bos_token": "w1"}
        theirs = words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert Chat(kept).render(talk) == theirs
    for wrong, said in (("{{ 1 + 'a' }}", "unsupported operand"), ("{{ raise_exception('no') }}", "no"), ("{%", "tag")):
        with pytest.raises(ValueError, match=f"the chat template fails on this conversation .*{said}"):
            Chat({"jinja": wrong}).render(talk)
    words.chat_template = "{{ raise_exception('no') }}"
    assert chat_template(words) is None and "renders nothing" in caplog.text
    words.chat_template = FULL
    monkeypatch.setattr(Chat, "_jinja", lambda self, messages: "another text")
    assert chat_template(words) is None and "'another text' is written for" in caplog.text


def test_the_command_line_counts_prompts(tmp_path):
    (tmp_path / "prompts.json").write_text('{"select": ["a"], "certify": ["b", "c"]}')
    asked = ["nowhere", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.json")]
    for words, said in (
        ([*asked, "--certify", "-3"], "--certify -3: certify on at least 1 prompt"),
        ([*asked, "--certify", "0"], "--certify 0"),
        ([*asked[:2], "--certify", "3"], "give --prompts, too"),
    ):
        with pytest.raises(ValueError, match=said):
            main(PARSER.parse_args(words))


def test_borrowed_keys_where_a_part_of_each_head_is_turned(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPE, "head_dim", 32)
    monkeypatch.setitem(SHAPE, "hidden_size", 128)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = made("phi3", "shared", rope_parameters=rope)
    compare(model, Runtime.load(export(model, tmp_path / "out", "fp32", tokenizer()), threads=1), [0.5, 0.5])
