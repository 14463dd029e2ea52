"""Compare recipes: train named variations of one configuration, judge each on the same held-out prompts.

    python eval/study.py --config configs/study.yaml
    python eval/study.py --config configs/study.yaml --only pair,mlp-1      # some of them

Each variation is trained by `accelerate launch train/exits.py` and judged on the full model's own greedy answers to
prompts that no variation trained on: one teacher-forced pass gives what every gate, every training-free score and every
exit says of each token. Harm is judged by the variation's own full depth; where that was trained along, the record also
has what the original thinks of it, and of the exits. eval/recipes.py makes figures, tables and pictures of it. In the
output folder:

    NAME/, NAME.yaml       the training run of a variation
    NAME.safetensors       what its exits and scores say of every token
    NAME.json              what changed, what training took, what exits cost, where it was run
    screen.json            how often the full model's word is among the entries that a screen or a fixed list holds
    answers.json, states/  the judged answers, and the frozen backbone's states, kept for variations to come
"""

import sys
from dataclasses import dataclass, field

from adaptive.checked import Checked, load_config


@dataclass
class StudyConfig(Checked):
    """What to compare, and on what.

    Attributes:
        base: YAML file of a training run
        variations: name -> what differs from `base`, nested as there
        prompts: .json file of prompts, as train/text.py writes
        part: which part of it to judge on
        output: folder to write to
        num_prompts: most prompts to judge on
        answer_tokens: most tokens of an answer
        only: names of the variations to run; empty = all
        ranks: of the screens to compare; empty = no such table
        entries: sizes of the shortlists to compare
    """

    base: str
    prompts: str
    output: str
    variations: dict
    part: str = "certify"
    num_prompts: int = 128
    answer_tokens: int = 40
    only: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=lambda: [256, 1024, 2048, 4096, 8192])

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(2, "num_prompts", "answer_tokens")
        if unknown := [name for name in self.only if name not in self.variations]:
            found.append(f"`only` has {unknown}; `variations` has {list(self.variations)}")
        wrong = [name for name, change in self.variations.items() if not isinstance(change or {}, dict)]
        return found + [f"`variations.{name}` must hold `field: value` lines" for name in wrong]


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(StudyConfig)

import json
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file
from tqdm import tqdm

from adaptive import losses
from adaptive.certify import load_tokenizer
from adaptive.checked import build
from adaptive.closed_form import STATES
from adaptive.config import ExitConfig, TrainConfig
from adaptive.data import digest
from adaptive.exits import BASELINES, Gate, best
from adaptive.kv import TrainingKV
from adaptive.model import EarlyExitModel
from adaptive.objective import exit_features, full_states
from adaptive.outcomes import answer
from adaptive.policy import ExitPolicy
from adaptive.prompts import encode, is_ids, read_parts
from adaptive.provenance import provenance
from adaptive.rows import load_rows, num_labelled, rows_of_step, split_rows, take
from adaptive.runs import put, write_json
from adaptive.screen import Screen
from adaptive.states import with_states

ROOT = Path(__file__).parents[1]


def main(config: StudyConfig) -> None:
    """Runs what is missing."""
    folder, base = Path(config.output), yaml.safe_load(Path(config.base).read_text())
    plans = {name: planned(base, change or {}, folder / name) for name, change in config.variations.items()}
    for name in tqdm(config.only or plans, desc="variations", unit="run"):
        path, plan = folder / f"{name}.json", plans[name]
        made_with = {"config": plan, "judged": [config.prompts, config.part, config.num_prompts, config.answer_tokens]}
        if path.exists() and json.loads(path.read_text())["made_with"] == made_with:
            continue
        took = train(plan, folder / f"{name}.yaml")
        model = EarlyExitModel.from_pretrained(plan["output"], dtype=torch.float32).eval()
        rows = answered(model, config, plan)
        found, extra = judged(model, rows), {}
        if plan.get("mode", "frozen") != "frozen":
            found |= by_original(model, rows, found["said"], plan, Path(config.output) / "states")
            extra = {"by_original": means(found, model.loss_config.tolerance)}
        put(folder / f"{name}.safetensors", lambda fresh, found=found: save_file(found, fresh))
        about = {"tolerance": model.loss_config.tolerance, "shape": model.costs.shape, "exits": model.costs.exits}
        training = {**spent(plan), **took}
        changes = config.variations[name] or {}
        record = {"name": name, "made_with": made_with, "changes": changes, **about, "training": training, **extra}
        write_json(path, record | provenance())
    if config.ranks and not (folder / "screen.json").exists():
        write_json(folder / "screen.json", {"table": screens(config, next(iter(plans.values()))), **provenance()})


def planned(base: dict, change: dict, output: Path) -> dict:
    """Returns a training configuration: `base` with what a variation changes, checked."""
    merged = {**base, **change}
    for nested in ("exits", "loss"):
        merged[nested] = {**base.get(nested, {}), **change.get(nested, {})}
    merged["output"] = str(output)
    build(TrainConfig, merged, [])
    return merged


def train(plan: dict, path: Path) -> dict:
    """Trains a variation through the real command, if it is not there; returns the "seconds" that it took, and the
    "cpu_seconds", which a busy machine does not stretch."""
    took = Path(plan["output"]) / "took.json"
    if took.exists() and json.loads(took.read_text())["config"] == plan:
        return json.loads(took.read_text())["took"]
    put(path, lambda fresh: fresh.write_text(yaml.safe_dump(plan)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--num_cpu_threads_per_process", str(torch.get_num_threads())]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, str(ROOT / "train" / "exits.py"), "--config", str(path), "--resume"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu}
    write_json(took, {"config": plan, "took": found})
    return found


def spent(plan: dict) -> dict:
    """Returns what training took: labelled tokens that exits learned from, and different ones of them."""
    config = build(TrainConfig, plan, [])
    rows = split_rows(load_rows(config.data, config.model, config.sequence_length), config.seed)[0]
    per_step, count = config.batch_size * config.accumulate, len(rows["labels"])
    seen = torch.cat([rows_of_step(step, count, per_step, config.seed) for step in range(config.steps)])
    different = num_labelled(take(rows, seen.unique()))
    tokens = sum(num_labelled(take(rows, part)) for part in seen.split(per_step))
    return {"tokens": tokens, "different_tokens": different, "kept_states": config.states is not None}


def original_of(plan: dict, depth: int = 1) -> EarlyExitModel:
    """Returns the model that a run started from, with one exit that nothing is asked of."""
    name = build(TrainConfig, plan, []).model
    return EarlyExitModel.from_backbone(name, ExitConfig([depth], head="norm"), dtype=torch.float32).eval()


def answered(model: EarlyExitModel, config: StudyConfig, plan: dict) -> dict:
    """Returns rows of prompts and the original model's greedy answers, with the backbone's states.

    The answers are kept beside the runs: all variations share them, also those that train the backbone.
    """
    prompts = read_parts(config.prompts, config.part)[0][: config.num_prompts]
    asked = encode(prompts, None if all(map(is_ids, prompts)) else load_tokenizer(model))
    path = Path(config.output) / "answers.json"
    key = digest(repr([asked, config.answer_tokens, plan.get("model")]).encode())
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("key") != key:
        said = answer(original_of(plan), asked, ExitPolicy.full(1), config.answer_tokens, 64)[0]
        found = {"key": key, "answers": said}
        write_json(path, found)
    width = max(len(a) + len(b) for a, b in zip(asked, found["answers"], strict=True))
    rows = {name: torch.zeros(len(asked), width, dtype=torch.int32) for name in ("input_ids", "attention_mask")}
    rows["labels"] = torch.full((len(asked), width), -100, dtype=torch.int32)
    for row, (ids, said) in enumerate(zip(asked, found["answers"], strict=True)):
        end = len(ids) + len(said)
        rows["input_ids"][row, :end] = torch.tensor(ids + said)
        rows["attention_mask"][row, :end] = 1
        rows["labels"][row, len(ids) : end] = torch.tensor(said)
    return with_states(model, rows, Path(plan.get("states") or Path(config.output) / "states"))


@torch.no_grad()
def judged(model: EarlyExitModel, rows: dict) -> dict:
    """Returns arrays about every answer token: "row", "place" (0 for an answer's first), "context" [tokens], "regret",
    "agrees" [tokens, exits], "said" [tokens, exits + 1], the words of exits and full depth, and a [tokens, exits] array
    of scores for the gates and for each training-free score."""
    view, exits = model.view, model.exits
    gates = {"gate": None} | {kind: Gate(view, kind) for kind in BASELINES}
    parts: dict[str, list] = {name: [] for name in ("row", "place", "context", "said", "regret", "agrees", *gates)}
    for row in tqdm(range(len(rows["labels"])), desc="judging", unit="prompt", leave=False):
        length = int(rows["attention_mask"][row].sum())
        start = int((rows["labels"][row] == -100)[:length].sum())
        places = slice(start - 1, length - 1)
        ids, cache = rows["input_ids"][row : row + 1, :length].long(), None
        embedded, calls = view.start(ids, None, None, None)
        *states, final = rows["states"][row : row + 1, :length].unbind(2)
        if exits.shares_kv:  # K/V are not kept with the states
            cache = TrainingKV(view.num_layers)
            states, final, calls = full_states(view, ids, None, model.depths, cache)
        full = view.logits(final[0, places]).float()
        columns: dict[str, list] = {name: [] for name in ("said", "regret", "agrees", *gates)}
        for index, depth in enumerate(model.depths):
            normed = exit_features(view, exits, index, depth, states[index], calls, cache)[0, places]
            logits, ids = exits.logits(view, index, normed)
            said, state = best(logits, ids), states[index][0, places]
            columns["said"].append(said)
            columns["regret"].append(losses.regret(full, said))
            columns["agrees"].append(said == full.argmax(-1))
            before = (states[index - 1] if index else embedded)[0, places]
            for name, gate in gates.items():
                judge = exits.gates[index] if gate is None else gate
                columns[name].append(judge.score(state, logits, before).float())
        columns["said"].append(full.argmax(-1))
        for name, column in columns.items():
            parts[name].append(torch.stack(column, 1).cpu().numpy())
        count = length - start
        parts["row"].append(np.full(count, row))
        parts["place"].append(np.arange(count))
        parts["context"].append(start + np.arange(count))
    found = {name: np.concatenate(part) for name, part in parts.items()}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


@torch.no_grad()
def by_original(model: EarlyExitModel, rows: dict, said: np.ndarray, plan: dict, folder: Path) -> dict:
    """Returns what the original makes of a backbone that was trained along: "original_regret" [tokens, exits + 1] of
    the words that exits and full depth said, "original_agrees" [tokens] with full depth, and "original_kl" [tokens]
    from it to the trained full depth."""
    original = original_of(plan, model.depths[0])
    plain = {name: rows[name] for name in ("input_ids", "attention_mask", "labels")}
    keep = rows["labels"][:, 1:] != -100
    then, now = (r["states"][:, :-1, -1][keep] for r in (with_states(original, plain, folder), rows))
    parts: dict[str, list] = {f"original_{name}": [] for name in ("regret", "agrees", "kl")}
    for before, after, words in zip(*(t.split(256) for t in (then, now, torch.from_numpy(said))), strict=True):
        full = original.view.logits(before).float()
        parts["original_regret"].append(torch.stack([losses.regret(full, word) for word in words.long().T], 1))
        parts["original_agrees"].append(words[:, -1] == full.argmax(-1))
        parts["original_kl"].append(losses.divergence(full, model.view.logits(after).float(), "forward"))
    return {name: torch.cat(part).numpy() for name, part in parts.items()}


def means(found: dict, tolerance: float) -> dict:
    """Returns, over tokens, what `by_original` found: shares of harmless words by exit, and what full depth pays."""
    *exits, full = (found["original_regret"] <= tolerance).mean(0).tolist()
    pays = {name: float(found[f"original_{name}"].mean()) for name in ("agrees", "kl")}
    return {"no_harm": exits, "full_depth": {"no_harm": full, **pays}}


@torch.no_grad()
def screens(config: StudyConfig, plan: dict) -> list[dict]:
    """Returns, for fixed lists and screens, the share of answer tokens whose word they hold, and the share of the LM
    head that they cost."""
    training = build(TrainConfig, plan, [])
    model = EarlyExitModel.from_backbone(training.model, training.exits, training.loss, dtype=torch.float32)
    rows = split_rows(load_rows(training.data, training.model, training.sequence_length), training.seed)[0]
    rows = with_states(model, rows, Path(plan.get("states") or Path(config.output) / "states"))
    counts = torch.bincount(rows["labels"][rows["labels"] >= 0], minlength=model.view.vocab_size)
    order, held = torch.argsort(counts, descending=True, stable=True), []
    fitted = rows["states"][:, :-1, -1][rows["labels"][:, 1:] != -100][:STATES]
    judged_on = answered(model, config, plan)
    keep = judged_on["labels"][:, 1:] != -100
    normed, wanted = judged_on["states"][:, :-1, -1][keep], judged_on["top"][:, :-1][keep][:, 0].long()
    for entries in config.entries:
        inside = torch.isin(wanted, order[:entries]).float().mean()
        held.append({"rank": None, "entries": entries, "head": entries / len(order), "holds": float(inside)})
    for rank in config.ranks:
        screen = Screen(model.view, rank)
        screen.fit(model.view, fitted)
        for entries in config.entries:
            pieces = zip(normed.split(256), wanted.split(256), strict=True)
            inside = torch.cat([screen.holds(state, word, entries) for state, word in pieces]).float().mean()
            cost = (screen.weights + entries * normed.shape[1]) / (len(order) * normed.shape[1])
            held.append({"rank": rank, "entries": entries, "head": cost, "holds": float(inside)})
    return held


if __name__ == "__main__":
    main(CONFIG)
