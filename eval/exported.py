"""What exporting does to a model: each precision's folder beside torch, on a text.

    python eval/exported.py --run runs/demo --text wikitext2.valid.jsonl --column page \
        --output results/exported.json

Full depth: perplexity, how often the likeliest token is torch's, and how far logits are apart; and the same for the
second halves of the sequences behind the first ones as prompts, which folders read by other graphs if they are long
enough. Exits: greedy answers to the beginnings of the text's passages, under thresholds that let half of the tokens
leave at each exit, and the share of tokens that leave where torch's do; a row is compared up to its first token that
differs: then it is another text.
"""

import sys
from dataclasses import dataclass, field

from adaptive.checked import Checked, load_config


@dataclass
class ExportedConfig(Checked):
    """What to compare, and on what.

    Attributes:
        run: folder of a trained model
        text: file, folder or data set, as adaptive.data.read_texts takes it
        column: of a .jsonl file that has its texts elsewhere
        precisions: of the folders
        sequence_length: tokens read at once
        sequences: most sequences read
        prompts: passages whose beginnings are continued
        prompt: tokens of these beginnings
        new: tokens of each answer
        output: JSON file of results
    """

    run: str
    text: str
    column: str | None = None
    precisions: list[str] = field(default_factory=lambda: ["fp32", "int8", "int4"])
    sequence_length: int = 512
    sequences: int = 16
    prompts: int = 32
    prompt: int = 32
    new: int = 32
    output: str = "runs/exported.json"

    def problems(self) -> list[str]:
        """One line for each fault."""
        unknown = sorted(set(self.precisions) - {"fp32", "int8", "int4"})
        found = [f"`precisions` has {unknown}; there are fp32, int8, int4"] if unknown else []
        return found + self._below(1, "sequences", "prompts", "prompt", "new") + self._below(2, "sequence_length")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(ExportedConfig)

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from adaptive.certify import load_tokenizer
from adaptive.data import pack, read_texts
from adaptive.export import export
from adaptive.folder import Folder
from adaptive.model import EarlyExitModel
from adaptive.outcomes import answer
from adaptive.policy import ExitPolicy
from adaptive.provenance import provenance
from adaptive.runs import write_json
from adaptive.session import Session


@torch.no_grad()
def main(config: ExportedConfig) -> dict:
    """Prints and returns the comparison."""
    model = EarlyExitModel.from_pretrained(config.run, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(model)
    lines = Path(config.text).read_text().splitlines() if config.column else []
    passages = [json.loads(line)[config.column] for line in lines] or read_texts(config.text)
    texts = [tokenizer.encode(text) for text in passages]
    rows = pack(texts, config.sequence_length, tokenizer.eos_token_id)[: config.sequences].astype(np.int64)
    asked = [ids[: config.prompt] for ids in texts if len(ids) >= config.prompt][: config.prompts]
    # One policy at which every exit is used, of the torch model's own scores.
    full = ExitPolicy.full(model.num_exits)
    scores = answer(model, asked, full, config.new, batch_size=len(asked), probe=True)[1].scores
    policy = ExitPolicy(tuple(np.nanmedian(scores, axis=(0, 1)).tolist()))
    theirs, half = [in_torch(model, row) for row in rows], config.sequence_length // 2
    expected = answer(model, asked, policy, config.new, batch_size=len(asked))
    tails = [one[half:] for one in theirs]
    found = {"torch": {"perplexity": perplexity(theirs, rows), "second_halves": perplexity(tails, rows[:, half:])}}
    print(found, flush=True)
    for precision in config.precisions:
        with tempfile.TemporaryDirectory() as work:
            folder = Folder(export(model, Path(work) / "out", precision, tokenizer))
            ours = [folder.runtime.logits(Session(folder.runtime, len(row)).prefill(row.tolist())) for row in rows]
            behind = [behind_a_prompt(folder.runtime, row, half) for row in rows]
            exits = leaving(answer(folder, asked, policy, config.new, batch_size=len(asked)), expected)
        found[precision] = {"perplexity": perplexity(ours, rows), **likeness(ours, theirs), **exits}
        found[precision]["second_halves"] = perplexity([one[half:] for one in ours], rows[:, half:])
        ends = {"perplexity": perplexity(behind, rows[:, half:]), **likeness(behind, tails)}
        found[precision]["behind_a_prompt"] = ends
        print({precision: found[precision]}, flush=True)
    document = {
        "provenance": provenance(),
        "settings": {name: getattr(config, name) for name in ("sequence_length", "prompts", "prompt", "new")},
        "text": Path(config.text).name,
        "tokens": int(rows.size),
        "thresholds": list(policy.thresholds),
        "results": found,
    }  # fmt: skip
    write_json(Path(config.output), document)
    return document


def in_torch(model, row: np.ndarray) -> np.ndarray:
    """Returns torch's full-depth logits [tokens, vocabulary] of one sequence."""
    return model.view.model(input_ids=torch.from_numpy(row[None]), use_cache=False).logits[0].float().numpy()


def behind_a_prompt(runtime, row: np.ndarray, half: int) -> np.ndarray:
    """Returns full-depth logits [tokens, vocabulary] of a sequence's end behind its first `half` tokens as a prompt."""
    session = Session(runtime, len(row))
    session.prefill(row[:half].tolist(), keep=False)
    return runtime.logits(session.prefill(row[half:].tolist()))


def perplexity(logits: list[np.ndarray], rows: np.ndarray) -> float:
    """Returns the perplexity of sequences, each read from its start."""
    total = sum(
        float(F.cross_entropy(torch.from_numpy(one[:-1]), torch.from_numpy(row[1:]), reduction="sum"))
        for one, row in zip(logits, rows, strict=True)
    )
    return round(math.exp(total / rows[:, 1:].size), 4)


def likeness(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    """Returns how often the likeliest tokens agree, and how far logits are apart."""
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "top_token_agrees": round(float(np.mean([one.argmax(1) == other.argmax(1) for one, other in pairs])), 5),
        "logit_difference_mean": float(np.mean([np.abs(one - other).mean() for one, other in pairs])),
        "logit_difference_most": float(max(np.abs(one - other).max() for one, other in pairs)),
    }


def leaving(ours: tuple, theirs: tuple) -> dict[str, float]:
    """Returns which share of the tokens left where torch's did, each row up to its first token that differs."""
    same = count = whole = 0
    for row, (mine, torchs) in enumerate(zip(ours[0], theirs[0], strict=True)):
        differ = [a != b for a, b in zip(mine, torchs)]
        until = differ.index(True) + 1 if True in differ else min(len(mine), len(torchs))
        same += int((ours[1].taken[row, :until] == theirs[1].taken[row, :until]).sum())
        count, whole = count + until, whole + (mine == torchs)
    early = float((theirs[1].taken >= 0).sum() - (theirs[1].taken == len(theirs[1].exits)).sum())
    return {"same_exit": round(same / count, 5), "tokens": count, "answers_alike": round(whole / len(ours[0]), 4),
            "left_early": round(early / float((theirs[1].taken >= 0).sum()), 4)}  # fmt: skip


if __name__ == "__main__":
    main(CONFIG)
