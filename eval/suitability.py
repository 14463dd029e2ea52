"""Would early exits pay on this model? A look at every depth, minutes instead of GPU hours.

    python eval/suitability.py MODEL                        # on text of the model's own making
    python eval/suitability.py MODEL --data texts.jsonl     # on yours, as train/exits.py reads it

Per depth: how often the full model's own norm and head already say its token there (raw exits), how often a linear
probe does, fitted in closed form, and what an oracle would save that leaves at the first depth that agrees. Writes
suitability.json and suitability.png, and says what to make of it. Needs the extra [demo] for the picture.
"""

import sys
from dataclasses import dataclass, field

from adaptive.checked import Checked, load_config


@dataclass
class SuitabilityConfig(Checked):
    """What to look at, and how closely.

    Attributes:
        model: id or folder of a causal LM
        data: token files, texts or data sets, as train/exits.py reads them; empty = the model writes its own
        output: folder for the results
        depths: after which blocks to look; empty = about 15, evenly spaced
        rows: sequences to read, or to write
        sequence_length: tokens of each
        positions: held-out tokens that exits are judged on
        exits: number of depths to suggest
        risk: harm per token that the confidence threshold may do
        tolerance: regret in nats up to which a token does no harm
        dtype: of the weights
        seed: of the text and the split
    """

    model: str
    data: list[str] = field(default_factory=list)
    output: str = "suitability"
    depths: list[int] = field(default_factory=list)
    rows: int = 128
    sequence_length: int = 96
    positions: int = 768
    exits: int = 3
    risk: float = 0.05
    tolerance: float = 0.25
    dtype: str = "float32"
    seed: int = 0

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(8, "rows", "sequence_length") + self._below(1, "positions", "exits")
        return found + self._below(0, "seed", "tolerance")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    WORDS = sys.argv[1:]
    CONFIG = load_config(SuitabilityConfig, ["--model", *WORDS] if WORDS and not WORDS[0].startswith("-") else WORDS)

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from adaptive import ranking, rows
from adaptive.config import ExitConfig
from adaptive.model import EarlyExitModel
from adaptive.objective import full_states
from adaptive.probing import fit_probe, written_states
from adaptive.provenance import provenance
from adaptive.runs import put, write_json

CHUNK = 128  # positions whose logits over the vocabulary are held at once
FITTED = 40_000  # most tokens a probe is fitted to
CONTEXT = 256  # tokens attended to where a token is priced


def main(config: SuitabilityConfig) -> dict:
    """Prints the verdict; writes and returns the figures."""
    begun = time.perf_counter()
    model = EarlyExitModel.from_backbone(config.model, ExitConfig([1]), dtype=config.dtype)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    depths = chosen_depths(config, model.view.num_layers)
    model = EarlyExitModel.from_backbone(model.backbone, ExitConfig(depths))
    if config.data:
        kept = read(config, model, depths)
    else:
        kept = written_states(model, depths, config.rows, config.sequence_length, config.seed)
    fit, held = divided(kept, config)
    found = look(model, depths, fit, held, config.tolerance)
    document = summary(model, depths, found, config)
    document["config"], document["provenance"] = asdict(config), provenance()
    document["fitted_tokens"], document["judged_tokens"] = len(fit["full"]), len(held["full"])
    document["seconds"] = time.perf_counter() - begun
    folder = Path(config.output)
    put(folder / "suitability.png", lambda fresh: picture(document).savefig(fresh, format="png", dpi=150))
    write_json(folder / "suitability.json", document)
    print(f"{table(document)}\n\n{document['verdict']}\n\n{document['seconds']:.0f} s; the rest is in {folder}")
    return document


def chosen_depths(config: SuitabilityConfig, layers: int) -> list[int]:
    """Returns the depths to look at.

    Raises:
        ValueError: one that the model does not have, or fewer than are to be suggested.
    """
    step = max(1, round(layers / 15))
    depths = sorted(set(config.depths)) or sorted(range(layers - step, 0, -step))
    if bad := [depth for depth in depths if not 0 < depth < layers]:
        raise ValueError(f"`depths` has {bad}; this model has {layers} blocks: use depths 1 to {layers - 1}")
    if len(depths) < config.exits:
        raise ValueError(f"`exits` is {config.exits}, but there are {len(depths)} depths to choose from: {depths}")
    return depths


@torch.no_grad()
def read(config: SuitabilityConfig, model: EarlyExitModel, depths: list[int]) -> list[dict]:
    """Returns the states {depth: [tokens, hidden]} of each row of the data, where a next token is wanted."""
    data, out = rows.load_rows(config.data, config.model, config.sequence_length), []
    order = torch.randperm(len(data["input_ids"]), generator=torch.Generator().manual_seed(config.seed))
    for indices in tqdm(order[: config.rows].split(8), desc="reading", unit="batch"):
        batch = rows.to_batch(rows.take(data, indices), model.device)
        found, normed, _ = full_states(model.view, batch["input_ids"], batch.get("attention_mask"), tuple(depths))
        keep = batch["labels"][:, 1:] != -100
        for row in range(len(indices)):
            named = zip([*depths, "full"], [*found, normed], strict=True)
            out.append({depth: state[row, :-1][keep[row]].float() for depth, state in named})
    return out


def divided(found: list[dict], config: SuitabilityConfig) -> tuple[dict, dict]:
    """Returns the states to fit to and to judge on, {depth: [N, hidden]}; every fourth row judges.

    Raises:
        ValueError: there are not enough rows.
    """
    if len(found) < 8:
        raise ValueError(f"`data` makes {len(found)} rows of {config.sequence_length} tokens; 8 are the least")
    parts = []
    for some, most in ((lambda row: row % 4 < 3, FITTED), (lambda row: row % 4 == 3, config.positions)):
        part = [row for index, row in enumerate(found) if some(index)]
        joined = {depth: torch.cat([row[depth] for row in part]) for depth in found[0]}
        order = torch.randperm(len(joined["full"]), generator=torch.Generator().manual_seed(config.seed))[:most]
        parts.append({depth: states[order.to(states.device)] for depth, states in joined.items()})
    return parts[0], parts[1]


@torch.no_grad()
def look(model: EarlyExitModel, depths: list[int], fit: dict, held: dict, tolerance: float) -> dict:
    """Returns by depth and kind ("raw", "probe") arrays [N]: `agrees`, `kl` in nats, `harm`, and `score`, the largest
    probability."""
    view, out = model.view, {(depth, kind): [] for depth in depths for kind in ("raw", "probe")}
    dtype, features = view.norm_dtype, {}
    for depth in tqdm(depths, desc="fitting probes", unit="depth"):
        raw = view.norm(held[depth].to(dtype)).float()
        weight, _ = fit_probe(view.norm(fit[depth].to(dtype)).float(), fit["full"])
        features[depth, "raw"] = raw
        features[depth, "probe"] = torch.cat([raw, raw.new_ones(len(raw), 1)], 1) @ weight
    for some in tqdm(torch.arange(len(held["full"])).split(CHUNK), desc="judging", unit="chunk"):
        full = view.logits(held["full"][some].to(dtype)).float()
        full_log, best = full.log_softmax(-1), full.amax(-1)
        for key, found in features.items():
            log = view.logits(found[some].to(dtype)).float().log_softmax(-1)
            score, said = log.max(-1)
            kl = F.kl_div(log, full_log, log_target=True, reduction="none").sum(-1)
            regret = best - full.gather(-1, said[:, None])[:, 0]
            out[key].append((regret <= 0, kl, regret > tolerance, score.exp()))
    joined = {key: [torch.cat(part).cpu().numpy() for part in zip(*parts)] for key, parts in out.items()}
    return {key: dict(zip(("agrees", "kl", "harm", "score"), arrays, strict=True)) for key, arrays in joined.items()}


def summary(model, depths: list[int], found: dict, config: SuitabilityConfig) -> dict:
    """Returns the figures by depth, the best depths, and what they mean."""
    shut = [False] * len(depths)
    costs = model.costs.by_exit(CONTEXT, shut)
    costs = costs / costs[-1]
    document = {"model": config.model, "layers": model.view.num_layers, "depths": []}
    for index, depth in enumerate(depths):
        line = {"depth": depth, "relative_flops": float(costs[index])}
        for kind in ("raw", "probe"):
            values = found[depth, kind]
            line[kind] = {"agreement": float(values["agrees"].mean()), "kl": float(values["kl"].mean())}
            line[kind]["harmless"] = float(1 - values["harm"].mean())
        document["depths"].append(line)
    for kind in ("raw", "probe"):
        agrees = np.stack([found[depth, kind]["agrees"] for depth in depths], 1)
        first = np.where(agrees.any(1), agrees.argmax(1), len(depths))
        document[f"oracle_{kind}"] = {
            "saving": float(1 - costs[first].mean()),
            "mean_depth": float(np.asarray([*depths, model.view.num_layers])[first].mean()),
            "shares": (np.bincount(first, minlength=len(depths) + 1) / len(first)).tolist(),
        }
    document["suggested"] = suggested(depths, found, costs, config)
    document["verdict"] = verdict(document, config)
    return document


def suggested(depths: list[int], found: dict, costs: np.ndarray, config: SuitabilityConfig) -> dict:
    """Returns the depths, added one by one, at which a threshold on the probes' largest probability saves most at the
    allowed harm, chosen on half of the held-out tokens; and what it saves and harms on the other half."""
    scores, harms, agrees = (
        np.stack([found[depth, "probe"][name] for depth in depths], 1).astype(float)
        for name in ("score", "harm", "agrees")
    )
    half, picked, best = len(scores) // 2, [], None
    for _ in range(config.exits):
        tried = []
        for index in set(range(len(depths))) - set(picked):
            some = sorted([*picked, index])
            price = np.broadcast_to(np.append(costs[some], 1.0), (half, len(some) + 1))
            thresholds = ranking.rank_thresholds(scores[:half, some], harms[:half, some], price, 1.0, config.risk)
            cost = ranking.predicted(thresholds, scores[:half, some], harms[:half, some], price)[1]
            tried.append((cost, _oracle_cost(agrees[:, some], costs[some]), some, thresholds))
        best = min(tried, key=lambda one: one[:2])
        picked = best[2]
    price = np.broadcast_to(np.append(costs[picked], 1.0), (len(scores) - half, len(picked) + 1))
    harm, cost = ranking.predicted(best[3], scores[half:, picked], harms[half:, picked], price)
    return {
        "depths": [depths[index] for index in picked],
        "oracle_saving": 1 - best[1],
        "threshold_saving": float(1 - cost),
        "threshold_harm": float(harm.mean()),
        "risk": config.risk,
    }


def _oracle_cost(agrees: np.ndarray, costs: np.ndarray) -> float:
    """Returns the mean cost of leaving at the first exit that agrees [N, exits], relative to full depth."""
    return float(np.append(costs, 1.0)[np.where(agrees.any(1), agrees.argmax(1), len(costs))].mean())


def verdict(document: dict, config: SuitabilityConfig) -> str:
    """Returns the figures in words."""
    pick, lines = document["suggested"], {line["depth"]: line for line in document["depths"]}
    deepest, half = lines[pick["depths"][-1]], min(lines, key=lambda depth: abs(depth - document["layers"] / 2))
    if pick["threshold_saving"] >= 0.15:
        word = "Suitable: even untrained gates save a good part of the work"
    elif pick["oracle_saving"] >= 0.15:
        word = "Worth training: there is much to save, but finding the tokens that may leave is left to the gates"
    else:
        word = "Hardly suitable: even somebody who knew which tokens may leave would save little"
    raw = "must be trained" if deepest["raw"]["agreement"] < 0.8 else "are of use as they are, and better trained"
    at = ", ".join(f"{depth}: {lines[depth]['probe']['agreement']:.2f}" for depth in pick["depths"])
    return f"""\
{word}.
- Suggested depths: {pick["depths"]} of {document["layers"]} (--exits.depths {",".join(map(str, pick["depths"]))}).
- An oracle with linear probes there would save {pick["oracle_saving"]:.0%} of the FLOPs; no gate reaches that. With
  probes at all depths looked at it would be {document["oracle_probe"]["saving"]:.0%}, with raw exits \
{document["oracle_raw"]["saving"]:.0%}.
- A plain confidence threshold on these probes, allowed to harm {pick["risk"]:.0%} of the tokens, saves \
{pick["threshold_saving"]:.0%} (and harms
  {pick["threshold_harm"]:.1%} of others). Trained gates and larger heads are there to beat this.
- Half way, at depth {half}, raw exits agree with the full model on {lines[half]["raw"]["agreement"]:.0%} of the \
tokens, probes on {lines[half]["probe"]["agreement"]:.0%}: exits {raw}.
- Expect trained `linear` exits near the probes' agreement ({at}). The probe has full rank and is
  fitted in squares to this text alone; a trained exit has a low rank and minimises the divergence itself, over more
  text. So with little training (under some 100k tokens) expect less than the probe, with much training more; heads
  with MLPs or blocks go further."""


def table(document: dict) -> str:
    """Returns the depths as a Markdown table."""
    names = ["depth", "FLOPs", "raw agrees", "raw KL", "probe agrees", "probe KL", "probe harmless"]
    rows_ = [names, ["---"] * len(names)]
    for line in document["depths"]:
        raw, fitted = line["raw"], line["probe"]
        row = [str(line["depth"]), f"{line['relative_flops']:.2f}", f"{raw['agreement']:.3f}", f"{raw['kl']:.2f}"]
        rows_.append([*row, f"{fitted['agreement']:.3f}", f"{fitted['kl']:.2f}", f"{fitted['harmless']:.3f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows_)


def picture(document: dict) -> Figure:
    """Returns agreement and divergence by depth, and where the oracle leaves."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    depths = [line["depth"] for line in document["depths"]]
    for kind, colour, label in (("raw", "#888888", "raw exits"), ("probe", "#0072b2", "linear probe")):
        for axes, name in ((left, "agreement"), (middle, "kl")):
            axes.plot(depths, [line[kind][name] for line in document["depths"]], color=colour, marker=".", label=label)
        shares = document[f"oracle_{kind}"]["shares"]
        right.step([*depths, document["layers"]], np.cumsum(shares), where="post", color=colour, label=label)
    titles = ("agrees with the full model", "KL from the full model, nats", "oracle: share of tokens that have left")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set(xlabel="depth, blocks", title=title)
        axes.grid(alpha=0.3)
        for depth in document["suggested"]["depths"]:
            axes.axvline(depth, color="#d55e00", ls=":", lw=1)
    left.set_ylim(0, 1)
    right.set_ylim(0, 1)
    left.legend(title=Path(document["model"]).name, fontsize=8)
    return figure


if __name__ == "__main__":
    print(json.dumps(main(CONFIG)["suggested"]))
