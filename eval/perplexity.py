"""Perplexity of the full depth on a text: what training in modes lora and full did to the model itself.

    python eval/perplexity.py --models smollm2-135m-instruct,runs/lora,runs/full --text wikitext2.valid.txt

Models are folders of trained runs, or ids and folders of plain causal LMs; the first is what the others are compared
with. The last line is one JSON document.
"""

import sys
from dataclasses import dataclass

from adaptive.checked import Checked, load_config


@dataclass
class PerplexityConfig(Checked):
    """What to read, and with what.

    Attributes:
        models: folders of trained runs, or ids or folders of causal LMs
        text: file, folder or data set, as adaptive.data.read_texts takes it
        sequence_length: tokens read at once
        sequences: most sequences read
        batch_size: sequences read at once
    """

    models: list[str]
    text: str
    sequence_length: int = 512
    sequences: int = 64
    batch_size: int = 4

    def problems(self) -> list[str]:
        """One line for each fault."""
        return self._below(1, "sequences", "batch_size") + self._below(2, "sequence_length")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(PerplexityConfig)

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive.data import pack, read_texts
from adaptive.model import EarlyExitModel
from adaptive.pretrained import resolve


def main(config: PerplexityConfig) -> dict[str, float]:
    """Prints and returns the perplexity of each model."""
    tokenizer, tokens, found = None, None, {}
    for name in config.models:
        model = loaded(name)
        if tokens is None:
            tokenizer = AutoTokenizer.from_pretrained(resolve(str(model.name_or_path)))
            texts = [tokenizer.encode(text) for text in read_texts(config.text)]
            packed = pack(texts, config.sequence_length, tokenizer.eos_token_id)[: config.sequences]
            tokens = torch.from_numpy(packed).long()
        found[name] = perplexity(model, tokens, config.batch_size, name)
    first = found[config.models[0]]
    for name, value in found.items():
        print(f"{name}: perplexity {value:.4f}, {value / first - 1:+.2%} against {config.models[0]}")
    print(json.dumps({"text": config.text, "tokens": tokens.numel(), "perplexity": found}))
    return found


def loaded(name: str) -> torch.nn.Module:
    """Returns the full depth of a model, in float32."""
    if (Path(name) / "exit_config.json").exists():
        model = EarlyExitModel.from_pretrained(name, dtype=torch.float32)
        inner = model.backbone.eval()
        inner.name_or_path = model.view.inner.name_or_path
        return inner
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor, batch_size: int, name: str) -> float:
    """Returns the perplexity of sequences [sequences, tokens], each read from its start."""
    total = 0.0
    for batch in tqdm(tokens.split(batch_size), desc=name, unit="batch"):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        total += float(F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / tokens[:, 1:].numel())


if __name__ == "__main__":
    main(CONFIG)
