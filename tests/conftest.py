"""Tiny random-init models of every family, and the real default model, for all tests."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # 2 threads on busy cores can be many times slower than 1
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
import transformers

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
VOCAB, LAYERS = 97, 4
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_GATED = dict(intermediate_size=48, num_key_value_heads=2)
_GPT2 = dict(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=LAYERS,
    n_head=4,
    n_positions=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def _configs() -> dict:
    t = transformers
    return {
        "llama": t.LlamaConfig(**_COMMON, **_GATED),
        "qwen2": t.Qwen2Config(**_COMMON, **_GATED),
        "qwen3": t.Qwen3Config(**_COMMON, **_GATED, head_dim=8),
        "mistral": t.MistralConfig(**_COMMON, **_GATED, sliding_window=6),
        "gemma3": t.Gemma3TextConfig(
            **_COMMON, **_GATED, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        "phi3": t.Phi3Config(**_COMMON, **_GATED),
        "olmo2": t.Olmo2Config(**_COMMON, **_GATED),
        "gpt2": t.GPT2Config(**_GPT2),
        "gpt_neox": t.GPTNeoXConfig(**_COMMON, intermediate_size=48),
        "opt": t.OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=32),
        "qwen3_moe": t.Qwen3MoeConfig(
            **_COMMON, **_GATED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        ),
    }


FAMILIES = sorted(_configs())


def tiny(family: str = "llama", seed: int = 0, **overrides) -> torch.nn.Module:
    """A 4-block random-init causal LM in eval mode; weights are scaled up so that tokens differ from each other."""
    config = _configs()[family]
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts(batch: int, seed: int = 0, longest: int = 9) -> dict:
    """A left-padded batch of random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def llama():
    """A tiny Llama."""
    return tiny("llama")


def script(name: str):
    """A script, such as "train/exits", as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
