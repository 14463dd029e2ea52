"""What gates might know: features, targets and a second look, compared offline on the exits of one run.

    python eval/gates.py --config configs/study_gates.yaml

Gates are trained anew on labelled rows and judged on others, whose labels are the full model's greedy answers.
Teacher-forced: certificates come from train/calibrate.py, never from here. Every way to decide pays for what it reads.
A *second look* asks a cheap gate first; only for tokens that pass are the exit's head and its logits evaluated, and a
second score decides. Who stays has paid for the look. All thresholds are chosen on half of the prompts and measured on
the other half, then the other way round; first tokens of answers are left out, as depth saves nothing there. Writes one
JSON file and prints a table.
"""

import sys
from dataclasses import asdict, dataclass

from adaptive.checked import Checked, load_config


@dataclass
class GatesConfig(Checked):
    """What to compare.

    Attributes:
        run: folder of a trained run
        train: token files of labelled rows to train gates on, those that the run held out left out
        judge: token files of labelled rows to judge them on; labels are the full model's greedy answers
        states: folder that keeps the backbone's states
        output: .json file to write
        splits: how many ways to halve the prompts; figures are means over them
        seed: of the run, of the gates trained here and of the halves
    """

    run: str
    train: list[str]
    judge: list[str]
    states: str
    output: str
    splits: int = 4
    seed: int = 0

    def problems(self) -> list[str]:
        """One line for each fault."""
        return self._below(1, "splits") + self._below(0, "seed")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(GatesConfig)

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from adaptive import losses
from adaptive.costs import Costs
from adaptive.exits import best
from adaptive.model import EarlyExitModel
from adaptive.provenance import provenance
from adaptive.ranking import auc
from adaptive.rows import load_rows, split_rows
from adaptive.runs import write_json
from adaptive.states import with_states

TOLERANCES = (0.1, 0.25, 0.5, 1.0)  # nats; targets that gates are trained towards, beside the run's own
SHOWN = (0.005, 0.01, 0.02, 0.05)  # measured harms that figures are interpolated to
WEIGHTS = np.geomspace(0.3, 60, 16)  # of harm against cost, in the search for thresholds
LEVELS = 12  # candidate thresholds of a first score, in front of a second look
PASSES = 6  # over the tokens that a gate is trained on


@dataclass
class Way:
    """One way to decide who leaves.

    Attributes:
        second: [tokens, exits], the score that decides.
        gate: weights multiplied at each exit to ask the first score (or the only one).
        first: [tokens, exits], the score that says who gets a look; None lets every token have one.
        look: [exits], weights of the head that a look needs; who leaves needs them anyway. None: no head is read.
    """

    second: np.ndarray
    gate: float = 0.0
    first: np.ndarray | None = None
    look: np.ndarray | None = None


def main(config: GatesConfig) -> dict:
    """Writes and returns all figures."""
    torch.manual_seed(config.seed)
    model = EarlyExitModel.from_pretrained(config.run, dtype=torch.float32).eval()
    name = str(model.view.inner.name_or_path)
    rows = {"train": split_rows(load_rows(config.train, name, 256), config.seed)[0]}
    rows["judged"] = load_rows(config.judge, name, 256)
    parts = {part: tokens_of(model, with_states(model, some, Path(config.states))) for part, some in rows.items()}
    judged = parts["judged"]
    judged = parts["judged"] = {key: value[judged["place"] > 0] for key, value in judged.items()}
    record = {"config": asdict(config), "depths": list(model.depths), "tolerance": model.loss_config.tolerance}
    record |= {"trained_on": len(parts["train"]["row"]), "judged_on": len(judged["row"])}
    record |= {"prompts": len(np.unique(judged["row"])), "no_harm": (1 - judged["harm"].mean(0)).tolist()}
    prices, full, none = priced(model.costs, Way(judged["gate"]), judged["context"])
    open_to_all, rest = np.full((len(model.depths), 2), 0.5), (judged["harm"], prices, none, judged["row"], full)
    record["oracle"] = measured(open_to_all, None, 1 - judged["harm"], *rest)[1]
    record |= {"ways": compared(model.costs, ways(model, parts), judged, config), **provenance()}
    write_json(Path(config.output), record)
    print(table(record))
    return record


@torch.no_grad()
def tokens_of(model: EarlyExitModel, rows: dict) -> dict:
    """Returns what is known of every labelled token: arrays "row", "place", "context" [tokens], "harm", "regret",
    "gate" (logit) [tokens, exits], "looks" [tokens, exits, 5] (best logit, margin, entropy, log of the best one's
    probability, and how many entries are within a nat of it); tensors "states", "heads" [tokens, exits, hidden]."""
    view, exits, labels = model.view, model.exits, rows["labels"]
    if exits.shares_kv or "block" in exits.kinds:
        raise ValueError("`run` has heads with attention, which need whole rows; give one with other heads")
    keep = labels[:, 1:] != -100
    row, column = keep.nonzero(as_tuple=True)
    first = keep.int().argmax(1)
    kept = rows["states"][:, :-1][keep]
    parts: dict[str, list] = {"regret": [], "gate": [], "looks": [], "heads": []}
    for states in tqdm(kept.split(256), desc="reading", unit="chunk"):
        full = view.logits(states[:, -1]).float()
        columns: dict[str, list] = {name: [] for name in parts}
        for index in range(len(exits)):
            normed = exits.heads[index](states[:, None, index])[:, 0]
            logits, ids = exits.logits(view, index, normed)
            columns["regret"].append(losses.regret(full, best(logits, ids)))
            columns["gate"].append(exits.gates[index].score(states[:, index]).logit(1e-6))
            columns["looks"].append(looked(logits.float()))
            columns["heads"].append(normed)
        for key, column_of in columns.items():
            parts[key].append(torch.stack(column_of, 1))
    found = {name: torch.cat(part) for name, part in parts.items()}
    found |= {"row": row, "place": column - first[row], "context": column + 1}
    arrays = {name: found.pop(name).numpy() for name in ("regret", "gate", "row", "place", "context")}
    return found | arrays | {"states": kept[:, :-1], "harm": (arrays["regret"] > model.loss_config.tolerance) * 1.0}


def looked(logits: Tensor) -> Tensor:
    """Returns five figures [tokens, 5] of an exit's logits [tokens, entries]."""
    top = logits.topk(2).values
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    near = (logits > top[:, :1] - 1).float().sum(-1).log()
    return torch.stack([top[:, 0], top[:, 0] - top[:, 1], entropy, logs.amax(-1), near], 1)


def fitted(x: Tensor, harmless: Tensor, hidden: int):
    """Returns a function from features [n, width] to logits [n, targets]: an MLP of `hidden` units, or a linear map
    where that is 0, trained on features x [N, width] towards targets [N, targets], classes balanced."""
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    width, targets = x.shape[1], harmless.shape[1]
    mlp = nn.Sequential(nn.Linear(width, max(hidden, 1)), nn.GELU(), nn.Linear(max(hidden, 1), targets))
    net, y = mlp if hidden else nn.Linear(width, targets), harmless.float()
    share = y.mean(0).clamp(0.02, 0.98)
    weight, steps = torch.where(harmless, 0.5 / share, 0.5 / (1 - share)), max(PASSES * len(x) // 256, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3 if width > 50 else 1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pick = torch.randint(len(x), (256,))
        out = net((x[pick] - mean) / std)
        loss = nn.functional.binary_cross_entropy_with_logits(out, y[pick], weight[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda features: net((features - mean) / std).detach()


def learned(parts: dict, reads: str, hidden: int, tolerances=(), pick: int = 0) -> dict[str, Tensor]:
    """Returns logits [tokens, exits] of gates trained on the "train" part, for each of the parts.

    Args:
        reads: names of `features`.
        tolerances: regrets that are targets of the same gate; none: the run's harm.
        pick: which target's logit is the score.
    """
    out = {name: torch.zeros(len(part["row"]), 0) for name, part in parts.items()}
    for index in range(parts["train"]["harm"].shape[1]):
        regret, harm = (torch.from_numpy(parts["train"][name][:, index]) for name in ("regret", "harm"))
        harmless = torch.stack([regret <= t for t in tolerances] or [harm == 0], 1)
        read = {name: features(part | {"before": out[name]}, index, reads.split()) for name, part in parts.items()}
        gate = fitted(read["train"], harmless, hidden)
        out = {name: torch.cat([out[name], gate(read[name])[:, pick, None]], 1) for name in parts}
    return out


def features(part: dict, index: int, names: list[str]) -> Tensor:
    """Returns what a gate of the exit `index` reads [tokens, width]: the "state"; its "change" since the exit before;
    what the gates "before" said; what a "cheap" gate says; "figures" of the exit's logits; the "head"'s state."""
    states = part["states"][:, [max(index - 1, 0), index]].float()
    last, state = (states / states.square().mean(-1, keepdim=True).sqrt()).unbind(1)
    found = {"state": state, "change": state - last, "before": part["before"], "figures": part["looks"][:, index]}
    found["head"] = part["heads"][:, index].float()
    found["cheap"] = part["cheap"][:, index : index + 1] if "cheap" in part else state[:, :0]
    return torch.cat([found[name] for name in names], 1)


def ways(model: EarlyExitModel, parts: dict) -> dict[str, Way]:
    """Returns everything that is compared, by name; gates are trained here."""
    width, exits = model.view.hidden_size, model.costs.exits
    heads = np.array([exit["head"] for exit in exits], float)
    whole = heads + [exit["vocab"] for exit in exits]
    mlp, cheap = learned(parts, "state", 64), 64 * width
    parts = {name: part | {"cheap": mlp[name]} for name, part in parts.items()}
    judged = parts["judged"]
    max_prob, margin, entropy = (judged["looks"][:, :, column].numpy() for column in (3, 1, 2))

    def trained(reads: str, hidden: int, *targets) -> np.ndarray:
        return learned(parts, reads, hidden, *targets)["judged"].numpy()

    first = {"gate": cheap, "first": mlp["judged"].numpy()}
    return {
        "gate of the run": Way(judged["gate"], exits[0]["gate"]),
        "linear, state": Way(trained("state", 0), width),
        "MLP, state": Way(first["first"], cheap),
        "MLP, state and change": Way(trained("state change", 64), 2 * cheap),
        "MLP, state and gates before": Way(trained("state before", 64), cheap),
        "MLP, state, target at 0.1 nats": Way(trained("state", 64, (0.1,)), cheap),
        "MLP, state, target at 1 nat": Way(trained("state", 64, (1.0,)), cheap),
        "MLP, state, four targets at once": Way(trained("state", 64, TOLERANCES, 1), cheap),
        "max_prob": Way(max_prob, look=whole),
        "margin": Way(margin, look=whole),
        "entropy": Way(-entropy, look=whole),
        "max_prob, as if it cost nothing": Way(max_prob),
        "second look: max_prob": Way(max_prob, look=whole, **first),
        "second look: linear, figures": Way(trained("cheap figures", 0), look=whole, **first),
        "second look: MLP of 16, figures": Way(trained("cheap figures", 16), look=whole, **first),
        "second look: MLP, figures and head": Way(trained("cheap figures head", 64), look=whole, **first),
        "second look: MLP, head, no logits": Way(trained("head", 64), look=heads, **first),
    }


def compared(costs: Costs, all_ways: dict[str, Way], judged: dict, config: GatesConfig) -> dict:
    """Returns, for each way, its AUC per exit and relative FLOPs at equal harm."""
    rows, harms = np.unique(judged["row"], return_inverse=True)[1], judged["harm"]
    generator, count, out = np.random.default_rng(config.seed), rows.max() + 1, {}
    halves = [generator.permutation(count) < count // 2 for _ in range(config.splits)]
    for name, way in tqdm(all_ways.items(), desc="thresholds", unit="way"):
        prices, full, looks = priced(costs, way, judged["context"])
        ats = []
        for half in halves:
            sides = [
                (None if way.first is None else way.first[on], way.second[on], harms[on], prices[on], looks, rows[on])
                for on in (half[rows], ~half[rows])
            ]
            pairs = [
                [measured(chosen, *other, full) for chosen in searched(*one, full)]
                for one, other in (sides, sides[::-1])
            ]
            line = sorted([(0.0, 1.0), *map(tuple, np.mean(pairs, 0))])
            ats.append(np.interp(SHOWN, *np.transpose(line)))
        out[name] = {
            "auc": [auc(score, harm == 0) for score, harm in zip(way.second.T, harms.T, strict=True)],
            "relative_flops": dict(zip(map(str, SHOWN), np.mean(ats, 0).tolist(), strict=True)),
            "spread_over_splits": np.std(ats, 0).tolist(),
        }
    return out


def priced(costs: Costs, way: Way, context: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Returns FLOPs [tokens, exits + 1] of leaving at each exit without a look in vain, the mean FLOPs of the plain
    model's tokens, and the FLOPs [exits] of a look in vain."""
    exits = [exit | {"gate": int(way.gate), "reads_logits": False} for exit in costs.exits]
    asked, (contexts, back) = Costs(costs.shape, exits), np.unique(context, return_inverse=True)
    prices = np.array([asked.by_exit(c) for c in contexts])[back]
    full = np.array([asked.by_exit(c, [False] * len(exits))[-1] for c in contexts])[back].mean()
    return prices, float(full), np.zeros(len(exits)) if way.look is None else 2 * way.look


def outcomes(thresholds: np.ndarray, first: np.ndarray | None, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns who gets a look and who leaves, bool [tokens, exits] each, as if every token came that far."""
    looks = np.isfinite(thresholds[:, 1]) & np.ones(second.shape, bool)
    if first is not None:
        looks = looks & (first >= thresholds[:, 0])
    return looks, looks & (second >= thresholds[:, 1])


def measured(thresholds: np.ndarray, first, second, harms, prices, looks, rows, full: float) -> tuple[float, float]:
    """Returns (mean harm of the prompts, relative FLOPs) of thresholds [exits, 2] on some tokens."""
    looked_at, leaves = outcomes(thresholds, first, second)
    count = leaves.shape[1]
    taken = np.where(leaves.any(1), leaves.argmax(1), count)[:, None]
    cost = np.take_along_axis(prices, taken, 1)[:, 0] + (looked_at & (np.arange(count) < taken)) @ looks
    harm = np.take_along_axis(np.pad(harms, ((0, 0), (0, 1))), taken, 1)[:, 0]
    prompts = np.unique(rows, return_inverse=True)[1]
    return float((np.bincount(prompts, harm) / np.bincount(prompts)).mean()), float(cost.mean() / full)


def searched(first, second, harms, prices, looks, rows, full: float) -> list[np.ndarray]:
    """Returns thresholds [exits, 2] (of the first and second score; inf: closed) for each weight of harm: coordinate
    descent on cost + weight * harm, one exit at a time, from the deepest up."""
    sizes = np.bincount(rows)
    share, scale = 1 / ((sizes > 0).sum() * sizes[rows]), 1 / (len(prices) * full)
    thresholds, found = np.full((harms.shape[1], 2), np.inf), []
    for weight in WEIGHTS:
        leave = prices * scale
        leave[:, :-1] += weight * share[:, None] * harms
        for _ in range(4):
            last = thresholds.copy()
            for index in reversed(range(len(thresholds))):
                thresholds[index] = best_cut(thresholds, first, second, index, leave, looks * scale)
            if np.array_equal(last, thresholds):
                break
        found.append(thresholds.copy())
    return found


def best_cut(thresholds, first, second, index: int, leave: np.ndarray, vain: np.ndarray) -> tuple[float, float]:
    """Returns the first and second threshold of one exit that cost least, while the other exits keep theirs.

    Args:
        leave: [tokens, exits + 1], what leaving at each exit costs, harm included.
        vain: [exits], what a look in vain costs.
    """
    looked_at, leaves = outcomes(thresholds, first, second)
    here, on = ~leaves[:, :index].any(1), leave[:, -1]
    for later in reversed(range(index + 1, len(thresholds))):
        on = np.where(leaves[:, later], leave[:, later], on + looked_at[:, later] * vain[later])
    second, gain = second[here, index], (leave[:, index] - on - vain[index])[here]
    order, found = np.argsort(-second, kind="stable"), (0.0, np.inf, np.inf)
    tried = [-np.inf] if first is None else np.quantile(first[:, index], np.linspace(0, 1, LEVELS, endpoint=False))
    for level in tried:
        passed = order if first is None else order[first[here, index][order] >= level]
        totals = len(passed) * vain[index] + np.cumsum(gain[passed])
        if len(totals) and totals.min() < found[0] - 1e-12:
            found = (totals.min(), level, second[passed[totals.argmin()]])
    return found[1:]


def table(record: dict) -> str:
    """Returns the relative FLOPs at equal harm as a Markdown table."""
    lines = [f"| way | AUC at {' / '.join(map(str, record['depths']))} | {' | '.join(f'{h:g}' for h in SHOWN)} |"]
    lines.append("|---" * (2 + len(SHOWN)) + "|")
    for name, found in record["ways"].items():
        aucs = " / ".join("-" if value is None else f"{value:.2f}" for value in found["auc"])
        flops = " | ".join(f"{value:.3f}" for value in found["relative_flops"].values())
        lines.append(f"| {name} | {aucs} | {flops} |")
    return "\n".join([*lines, f"An oracle that leaves at the earliest exit without harm: {record['oracle']:.3f}"])


if __name__ == "__main__":
    main(CONFIG)
