"""The wrapped model: what it costs, what it refuses, and what its loss means."""

import pytest
import torch
from conftest import VOCAB, prompts, tiny
from torch import nn

from adaptive import EarlyExitModel, ExitConfig, losses
from adaptive.config import LossConfig


def batch(rows=2, tokens=10, seed=0):
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def test_loss_is_the_exact_divergence_computed_by_hand(llama):
    """With every entry a candidate, and with the chunked form, the loss is KL over the whole vocabulary."""
    inputs = batch()
    with torch.no_grad():
        out = llama(inputs["input_ids"], output_hidden_states=True)
        teacher = out.logits[:, :-1].log_softmax(-1)
        expected = 0.0
        for depth in (1, 3):
            student = llama.lm_head(llama.model.norm(out.hidden_states[depth]))[:, :-1].log_softmax(-1)
            expected += (teacher.exp() * (teacher - student)).sum(-1).mean() / 2
    for negatives in (None, VOCAB):
        model = EarlyExitModel(llama, ExitConfig(depths=[1, 3], head="norm"), LossConfig(negatives=negatives))
        loss = sum(model(**inputs).metrics[f"exit_{depth}/loss"] for depth in (1, 3)) / 2
        assert torch.allclose(loss, expected, rtol=1e-4)


def test_metrics_say_what_the_exits_do(llama):
    model = EarlyExitModel(llama, ExitConfig(depths=[2], head="norm")).eval()
    inputs = batch()
    metrics = model(**inputs).metrics
    with torch.no_grad():
        out = llama(inputs["input_ids"], output_hidden_states=True)
        said = llama.lm_head(llama.model.norm(out.hidden_states[2]))[:, :-1].argmax(-1)
        lost = losses.regret(out.logits[:, :-1].flatten(0, 1), said.flatten())
    assert metrics["exit_2/agreement"] == pytest.approx(float((lost == 0).float().mean()))
    assert metrics["exit_2/no_harm"] == pytest.approx(float((lost <= 0.25).float().mean()))
    assert 0 < metrics["exit_2/no_harm"] < 1


@pytest.mark.parametrize(
    "head,kv", [("norm", "own"), ("linear", "own"), ("mlp", "own"), ("block", "own"), ("block", "shared")]
)
def test_frozen_training_moves_exits_and_gates_only(head, kv):
    layers = 1 if kv == "shared" else 2
    model = EarlyExitModel(tiny("qwen3"), ExitConfig(depths=[1, 3], head=head, head_kv=kv, layers=layers)).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch()).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("exits.") for name in moved)
    assert any("heads" in name for name in moved) and any("gates" in name for name in moved)
    still = {name for name in before if name.startswith("exits.") and name not in moved}
    # A linear head's `up` starts at 0, so `down` gets no gradient yet; shared K/V leave a block's own unread.
    unread = {"linear": ("down",), "block": ("k_proj", "v_proj", "k_norm") if kv == "shared" else ()}
    assert all(any(part in name for part in unread.get(head, ())) for name in still)


def test_gates_never_bend_their_exits(llama):
    """Another gate, the same gradient of the exits, bit for bit."""
    model, found = EarlyExitModel(llama, ExitConfig(depths=[1, 3])).train(), []
    model.own_clock = False
    for _ in range(2):
        model(**batch()).loss.backward()
        found.append([p.grad.clone() for p in model.exit_parameters() if p.grad is not None])
        assert all(p.grad is not None for p in model.gate_parameters())
        model.zero_grad()
        for gate in model.exits.gates:
            gate.read.weight.data.add_(1.0)
    assert found[0] and all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_full_mode_learns_from_the_model_as_it_was(llama):
    model = EarlyExitModel(llama, ExitConfig(depths=[2]))
    model.train_mode("full")
    inputs = batch()
    assert model(**inputs).metrics["final/kl"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        llama.model.layers[3].mlp.down_proj.weight.add_(0.3)
    assert model(**inputs).metrics["final/kl"] > 0.01
    model.loss_config.layer_dropout = 0.9
    model.train()
    assert model(**inputs).loss.isfinite()


def test_lora_teacher_is_the_backbone_without_its_adapter():
    import peft

    backbone = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model = EarlyExitModel.from_backbone(backbone, ExitConfig(depths=[2], head="block"))
    model.train_mode("lora")
    assert model(**batch()).metrics["final/kl"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    out = model(**batch())
    assert out.metrics["final/kl"] > 0.01
    out.loss.backward()
    assert all(("lora" in name) == (p.grad is not None) for name, p in model.backbone.named_parameters())
    expected = backbone.generate(**prompts(2), max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**prompts(2), max_new_tokens=6, do_sample=False), expected)


def test_a_batch_without_labels_to_learn_from_costs_nothing(llama):
    model = EarlyExitModel(llama, ExitConfig(depths=[2])).train()
    inputs = batch()
    inputs["labels"][:] = -100
    out = model(**inputs)
    out.loss.backward()
    assert out.loss == 0 and all(not p.grad.any() for p in model.gate_parameters())


def test_no_exit_makes_logits_for_the_whole_vocabulary(llama):
    """Peak memory: the largest tensor of a step stays below one exit's full logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Largest.numel = max(Largest.numel, tensor.numel())
            return out

    backbone = tiny("llama", vocab_size=4096)
    model = EarlyExitModel(backbone, ExitConfig(depths=[1, 2, 3]), LossConfig(negatives=64, top_k=4)).train()
    inputs = batch(rows=4, tokens=400)
    with Largest():
        model(**inputs).loss.backward()
    assert Largest.numel < 4 * 400 * 4096 / 2


def test_trainer_of_transformers_trains_it(llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = EarlyExitModel(llama, ExitConfig(depths=[1, 3]))
    data = [{"input_ids": row, "labels": row} for row in batch(rows=16)["input_ids"]]
    args = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=5e-3, use_cpu=True, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged[-1] < logged[0]


def test_random_draws_change_without_our_loop(llama):
    model = EarlyExitModel(llama, ExitConfig(depths=[1, 3]), LossConfig(curriculum="rotational")).train()
    trained = {name for _ in range(2) for name in model(**batch()).metrics if name.endswith("/loss")}
    assert trained == {"exit_1/loss", "exit_3/loss"} and model.step == 2
    model.eval()(**batch())
    assert model.step == 2


def test_threads_can_generate_and_ask_for_logits_at_once(llama):
    from concurrent.futures import ThreadPoolExecutor

    model = EarlyExitModel(llama, ExitConfig(depths=[1, 3])).eval()
    settings = dict(max_new_tokens=12, do_sample=False, policy=[0.5, 0.5])
    expected = [model.generate(**prompts(3, seed=seed), **settings) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: model.generate(**prompts(3, seed=seed), **settings), range(8)))
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        asked = [prompts(3, seed=seed) for seed in range(8)]
        logits = [model(**each).logits.detach() for each in asked]
        talk = [pool.submit(model.generate, **prompts(3, seed=seed), **settings) for seed in (*range(8), *range(8))]
        for _ in range(8):
            found = list(pool.map(lambda each: model(**each).logits.detach(), asked))
            assert all(torch.equal(a, b) for a, b in zip(logits, found, strict=True))
        assert all(torch.equal(a.result(), b) for a, b in zip(talk, expected * 2, strict=True))


def test_wrong_places_for_exits_are_named(llama):
    with pytest.raises(ValueError, match="(?s)9.*4"):
        EarlyExitModel(llama, ExitConfig(depths=[2, 9]))
    with pytest.raises(ValueError, match="shortlist"):
        EarlyExitModel(llama, ExitConfig(depths=[4]))
    with pytest.raises(ValueError, match="(?s)1000.*97"):
        EarlyExitModel(llama, ExitConfig(depths=[2], shortlist=1000))


def test_unknown_model_says_what_was_looked_for_and_how_to_name_it():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny("llama")
            self.config = self.inner.config
            self.body = nn.Module()
            self.body.twice = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])

        def get_output_embeddings(self):
            return self.inner.lm_head

    with pytest.raises(ValueError, match="(?s)looked for.*ModuleList.*body.twice.*ExitConfig.blocks="):
        EarlyExitModel(Odd(), ExitConfig(depths=[2]))
    named = EarlyExitModel(tiny("gpt2"), ExitConfig(depths=[2], blocks="transformer.h"))
    assert len(named.view.blocks) == 4
    with pytest.raises(ValueError, match="is not a module"):
        EarlyExitModel(tiny("gpt2"), ExitConfig(depths=[2], blocks="transformer.nothing"))


def test_a_backbone_that_learned_a_prompt_is_refused_by_name():
    import peft

    learned = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="'default' is a PromptTuningConfig.*LoRA"):
        EarlyExitModel(learned, ExitConfig(depths=[2]))


def test_a_backbone_set_to_give_tuples_is_refused_by_name(llama):
    llama.config.return_dict = False
    with pytest.raises(ValueError, match="return_dict is False.*set it to True"):
        EarlyExitModel(llama, ExitConfig(depths=[2]))


def test_a_vocabulary_resized_since_is_the_one_that_is_read():
    model = EarlyExitModel.from_backbone(tiny("llama", tie_word_embeddings=False), ExitConfig(depths=[2]))
    model.backbone.resize_token_embeddings(101, mean_resizing=False)
    with torch.no_grad():
        model.backbone.lm_head.weight[97:] = 9.0
        model.backbone.lm_head.weight[99] = -9.0
    ids, settings = batch()["input_ids"], dict(max_new_tokens=4, do_sample=False)
    loss = model(**batch()).loss
    assert loss.isfinite() and model.view.vocab_size == 101
    for policy in ([2.0], [0.0]):
        said = model.generate(ids, policy=policy, **settings)[:, 10:]
        assert (said >= 97).any()
    assert torch.equal(model.generate(ids, policy=[2.0], **settings), model.backbone.generate(ids, **settings))
