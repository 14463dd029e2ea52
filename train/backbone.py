"""Train a small backbone from scratch on local text: a Llama or a GPT-2, to try recipes where no model can be fetched.

    python train/backbone.py --config configs/small_backbone.yaml
    python train/backbone.py --data notes/ --output runs/mine --family gpt2 --layers 6 --steps 500

It learns the tokenizer from the text first (byte-level BPE), then the weights. The output folder is a model like any
other: `from_pretrained` and every script here take it. The same command goes on with an interrupted run and ends in the
same result, since what a step does is a function of (seed, step). In the output folder, beside model and tokenizer:

    run.json  metrics.jsonl  last/state.safetensors     the configuration, a line per step, what going on needs
    summary.json                                        parameters, tokens, held-out perplexity, where it was trained
"""

import sys
from dataclasses import dataclass
from typing import Literal

from adaptive.checked import Checked, load_config


@dataclass(kw_only=True)
class BackboneConfig(Checked):
    """What to train, and on what.

    Attributes:
        data: folders or files of texts, or names of data sets
        output: folder that the model is written to
        family: architecture: llama (rotary, RMS norm, gated MLP) or gpt2 (learned places, layer norm, plain MLP)
        vocabulary: most entries of the tokenizer; a short text gives fewer
        hidden: width of the state
        layers: number of decoder blocks
        heads: attention heads of a block
        kv_heads: heads of keys and values in family llama; none = as many as heads
        sequence_length: tokens per sequence, and the longest that the model can read
        batch_size: sequences per step
        steps: optimizer steps
        learning_rate: the largest of the schedule
        eval_every: steps from one evaluation and checkpoint to the next
        seed: of initial values, held-out rows and data order
    """

    data: list[str]
    output: str
    family: Literal["llama", "gpt2"] = "llama"
    vocabulary: int = 8192
    hidden: int = 384
    layers: int = 10
    heads: int = 6
    kv_heads: int | None = None
    sequence_length: int = 128
    batch_size: int = 8
    steps: int
    learning_rate: float = 1e-3
    eval_every: int = 100
    seed: int = 0

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(1, "hidden", "layers", "heads", "kv_heads", "batch_size", "steps", "eval_every")
        found += self._below(2, "sequence_length") + self._below(0, "seed") + self._below(257, "vocabulary")
        if not self.data:
            found.append("`data` is empty; name at least one folder, file or data set")
        if not 0 < self.learning_rate < float("inf"):
            found.append(f"`learning_rate` is {self.learning_rate}; it must be above 0")
        if not found and self.hidden % (2 * self.heads):
            found.append(f"`hidden` is {self.hidden}; it must be a multiple of twice the {self.heads} `heads`")
        if not found and self.heads % (self.kv_heads or 1):
            found.append(f"`kv_heads` is {self.kv_heads}; the {self.heads} `heads` must be a multiple of it")
        if self.kv_heads and self.family == "gpt2":
            found.append(f"`kv_heads` is {self.kv_heads} but `family` is 'gpt2', which has as many as heads; leave it")
        return found


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(BackboneConfig)

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaptive.data import digest, read_texts
from adaptive.provenance import provenance
from adaptive.rows import Rows, load_rows, num_labelled, rows_of_step, split_rows
from adaptive.runs import STATE, Metrics, earlier_run, put, read_state, write_json

END = "<|endoftext|>"  # between texts, and the first token of a text that the model begins
WARM_UP, DECAY = 0.1, 0.4  # shares of the steps
MAX_GRADIENT_NORM, WEIGHT_DECAY = 1.0, 0.1


def main(config: BackboneConfig) -> dict:
    """Trains, or goes on training, and returns the summary that it also writes."""
    folder = Path(config.output)
    record = {name: value for name, value in asdict(config).items() if name != "output"}
    earlier = earlier_run(folder, record, resume=True)
    if earlier is not None:
        print(f"{folder} is finished, with this configuration; nothing to do")
        return earlier
    write_json(folder / "run.json", record)
    if not (folder / "tokenizer_config.json").exists():
        save_tokenizer(tokenizer_of(config), folder)
    rows, held_out = split_rows(load_rows(config.data, config.output, config.sequence_length), config.seed)
    model = fresh_model(config, PreTrainedTokenizerFast.from_pretrained(folder))
    # As usual, norms and biases do not decay.
    groups = [[p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (True, False)]
    groups = [{"params": p, "weight_decay": d} for p, d in zip(groups, (WEIGHT_DECAY, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    progress = {"step": 0, "seconds": 0.0, "data_sha256": digest(rows)}
    progress = load_state(folder / STATE, model, optimizer, progress)
    train(config, model, optimizer, rows, held_out, progress)
    model.eval().save_pretrained(folder)
    seen = [rows_of_step(step, len(rows["labels"]), config.batch_size, config.seed) for step in range(config.steps)]
    loss = held_out_loss(model, held_out, config.batch_size)
    summary = {
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": model.config.vocab_size,
        "tokens": config.steps * config.batch_size * config.sequence_length,
        "different_tokens": len(torch.cat(seen).unique()) * config.sequence_length,
        "held_out_tokens": num_labelled(held_out),
        "held_out": {"nats": loss, "perplexity": math.exp(loss), "unigram_nats": unigram_loss(model, rows, held_out)},
        **progress,
        **provenance("tokenizers"),
    }
    write_json(folder / "summary.json", summary)
    print(json.dumps(summary))
    return summary


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a tokenizer's files, last the one by which it is known to be there."""
    fresh = folder / "tokenizer.new"
    tokenizer.save_pretrained(fresh)
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == "tokenizer_config.json"):
        os.replace(path, folder / path.name)
    fresh.rmdir()


def tokenizer_of(config: BackboneConfig) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE learned from the texts (Radford et al. 2019, section 2.2); it can spell any text."""
    texts = [text for source in config.data for text in read_texts(source)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=config.vocabulary, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    named = {"bos_token": END, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=config.sequence_length, **named)


def fresh_model(config: BackboneConfig, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """Returns the model at its initial values; both families have MLPs of the same number of weights."""
    torch.manual_seed(config.seed)
    end = tokenizer.eos_token_id
    common = {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    common |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    if config.family == "gpt2":
        # No dropout: hardly a row is seen twice.
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_embd": config.hidden, "n_layer": config.layers, "n_head": config.heads}
        return GPT2LMHeadModel(GPT2Config(**common, **sizes, **drop, n_positions=config.sequence_length))
    return LlamaForCausalLM(
        LlamaConfig(
            **common,
            hidden_size=config.hidden,
            intermediate_size=math.ceil(8 * config.hidden / 3 / 32) * 32,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads or config.heads,
            max_position_embeddings=config.sequence_length,
        )
    )


def train(config: BackboneConfig, model: nn.Module, optimizer, rows: Rows, held_out: Rows, progress: dict) -> None:
    """Takes the steps that are left, and keeps what going on needs with every evaluation."""
    folder, done = Path(config.output), progress["step"]
    lines, start = Metrics(folder, done), time.perf_counter() - progress["seconds"]
    bar = tqdm(range(done, config.steps), initial=done, total=config.steps, unit="step")
    for step in bar:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * pace_at(step, config.steps)
        indices = rows_of_step(step, len(rows["labels"]), config.batch_size, config.seed)
        loss = loss_of(model, rows["input_ids"][indices].long())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step + 1}; lower `learning_rate` (now {config.learning_rate}) and "
                "train into another `output`"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": loss.item(), "learning_rate": optimizer.param_groups[0]["lr"]}
        due = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
        if due:
            metrics["eval/loss"] = held_out_loss(model, held_out, config.batch_size)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        lines.write(step + 1, metrics)
        if due:
            print(f"\nstep {step + 1}, held out: {metrics['eval/loss']:.3f} nats")
            progress |= {"step": step + 1, "seconds": time.perf_counter() - start}
            save_state(folder / STATE, model, optimizer, progress)


def pace_at(step: int, steps: int) -> float:
    """Returns the share of the largest learning rate in a step: linear warm-up, slow fall, then linearly to nothing.

    A long time near the top and a short fall at the end suit a run of few steps (Hu et al. 2024, section 4)."""
    slow = 0.55 + 0.45 * math.cos(math.pi * step / (2 * steps))
    return min(1.0, (step + 1) / (WARM_UP * steps)) * slow * min(1.0, (steps - step) / (DECAY * steps))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the mean cross-entropy (0-dim, nats) of the next token in ids [batch, tokens]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Rows, batch_size: int) -> float:
    """Returns the mean cross-entropy in nats on the held-out rows."""
    model.eval()
    parts = held_out["input_ids"].long().split(batch_size)
    return sum(float(loss_of(model, part)) * len(part) for part in parts) / len(held_out["input_ids"])


def unigram_loss(model: nn.Module, rows: Rows, held_out: Rows) -> float:
    """Returns the nats per held-out token of how often each entry comes in training rows: what knowing no context is
    worth."""
    counts = torch.bincount(rows["input_ids"].flatten(), minlength=model.config.vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[held_out["input_ids"][:, 1:].long()].mean())


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Writes weights and what the optimizer remembers of them, by name, with `progress` in the header."""
    tensors = {f"model/{name}": weight.detach() for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        tensors |= {f"{kind}/{name}": tensor for kind, tensor in optimizer.state.get(weight, {}).items()}
    put(path, lambda fresh: save_file(tensors, fresh, {"progress": json.dumps(progress)}))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fresh: dict) -> dict:
    """Puts back what `save_state` wrote; returns its progress, `fresh` when there is none yet.

    Raises:
        ValueError: the texts are others now, or the file is broken.
    """
    if not path.exists():
        return fresh
    weights = dict(model.named_parameters())
    progress, tensors = read_state(path)
    if progress["data_sha256"] != fresh["data_sha256"]:
        raise ValueError(f"`{path}` was trained on other texts than `data` has now; train into another `output`")
    for key, tensor in tensors.items():
        kind, name = key.split("/")
        if kind == "model":
            weights[name].data.copy_(tensor)
        else:
            optimizer.state[weights[name]][kind] = tensor
    return progress


if __name__ == "__main__":
    main(CONFIG)
