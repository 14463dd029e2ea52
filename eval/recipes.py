"""Tables and pictures of a study: what recipes save at equal harm, how far their gates are from an oracle.

    python eval/recipes.py --study runs/study --output results/recipes

Thresholds are chosen on half of the prompts and measured on the other half, then the other way round; which exits to
close is part of the choice. Every score pays what it costs: a training-free one has no gate, but most must evaluate an
exit's head before they know whether to leave. Figures at equal harm are interpolated between measured points. The
oracle leaves at the earliest exit that does no harm. In the output folder:

    NAME.json              every figure of a variation
    screen.json            copied from the study
    summary.md             the tables
    frontier.png           harm against FLOPs of each variation, with its own gates
    gates.png              harm against FLOPs of each score, on one variation
    tokens.png             share of tokens that exits do no harm to, against tokens trained on
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from adaptive.checked import Checked, load_config


@dataclass
class RecipesConfig(Checked):
    """What to draw.

    Attributes:
        study: folder that eval/study.py wrote
        output: folder for tables and pictures
        shown: variation whose scores are compared in gates.png; none = the one that saves most
    """

    study: str
    output: str
    shown: str | None = None

    def problems(self) -> list[str]:
        """One line for each fault."""
        return [] if Path(self.study).is_dir() else [f"`study` is {self.study}; give the folder of eval/study.py"]


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(RecipesConfig)

import json

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from tqdm import tqdm

from adaptive import ranking
from adaptive.costs import Costs
from adaptive.policy import ExitPolicy, Trace
from adaptive.ranking import auc
from adaptive.runs import put, write_json

SCORES = ("gate", "max_prob", "margin", "entropy", "similarity")
TARGETS = (0.005, 0.01, 0.02, 0.04, 0.08)  # harms that thresholds are chosen for
SHOWN = (0.005, 0.01, 0.02, 0.05)  # measured harms that figures are interpolated to
GRID = 64  # candidate thresholds per exit
PARTS = ("relative_flops", "depth", "shortlist", "overhead")


def main(config: RecipesConfig) -> list[dict]:
    """Writes everything; returns the figures of the variations."""
    study, folder, done = Path(config.study), Path(config.output), []
    paths = [path for path in sorted(study.glob("*.json")) if path.with_suffix(".safetensors").exists()]
    if not paths:
        raise ValueError(f"`study` is {study}, which holds no judged variation; run eval/study.py first")
    for path in tqdm(paths, desc="variations", unit="run"):
        record, found = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        found["harm"] = (found["regret"] > record["tolerance"]).astype(float)
        record |= {"tokens": len(found["row"]), "prompts": len(np.unique(found["row"]))}
        record |= {"about_exits": about_exits(record, found), "scores": compared(record, found)}
        write_json(folder / path.name, record)
        done.append(record)
    done.sort(key=lambda record: record["scores"]["gate"]["at"]["0.01"]["relative_flops"])
    chosen = next((record for record in done if record["name"] == config.shown), done[0])
    screen = json.loads((study / "screen.json").read_text()) if (study / "screen.json").exists() else None
    if screen:
        write_json(folder / "screen.json", screen)
    text = summary(done, screen)
    put(folder / "summary.md", lambda fresh: fresh.write_text(text))
    for name, picture in (("frontier", frontiers(done)), ("gates", gates(chosen)), ("tokens", over_tokens(done))):
        put(folder / f"{name}.png", lambda fresh, picture=picture: picture.savefig(fresh, format="png", dpi=120))
    print(text)
    return done


def about_exits(record: dict, found: dict) -> list[dict]:
    """Returns, for each exit, how often it is right and how well each score tells when."""
    out = []
    for index, exit in enumerate(record["exits"]):
        fine = found["harm"][:, index] == 0
        aucs = {name: auc(found[name][:, index], fine) for name in SCORES}
        right = {"agreement": float(found["agrees"][:, index].mean()), "no_harm": float(fine.mean())}
        out.append({"depth": exit["depth"], **right, "auc": aucs})
    return out


def compared(record: dict, found: dict) -> dict:
    """Returns measured points and figures at equal harm for each score and one shared threshold, and the oracle's."""
    found = found | {"shared": found["gate"], "oracle": 1.0 - found["harm"]}
    everything = np.ones(len(found["row"]), bool)
    out = {"oracle": measured(record, found, "oracle", (0.5,) * len(record["exits"]), everything)}
    for name in (*SCORES, "shared"):
        pairs: dict[float, list] = {target: [] for target in TARGETS}
        for chosen in (found["row"] % 2 == 0, found["row"] % 2 == 1):
            for target, thresholds in choices(record, found, name, chosen):
                pairs[target].append(measured(record, found, name, thresholds, ~chosen))
        line = [{key: float(np.mean([point[key] for point in pair])) for key in pair[0]} for pair in pairs.values()]
        out[name] = {"points": line, "at": {str(harm): at_harm(line, harm) for harm in SHOWN}}
    return out


def choices(record: dict, found: dict, name: str, chosen: np.ndarray) -> list[tuple[float, tuple]]:
    """Returns (target, thresholds) of least cost on the `chosen` tokens, which exits to close included."""
    count = len(record["exits"])
    # A first token comes out of the prefill, where depth saves nothing.
    chosen = chosen & (found["place"] > 0)
    scores, harms, rows = found[name][chosen], found["harm"][chosen], found["row"][chosen]
    contexts, back = np.unique(found["context"][chosen], return_inverse=True)
    costs = costs_of(record, name)
    full = float(np.mean(np.array([costs.by_exit(c, [False] * count)[-1] for c in contexts])[back]))
    best = {target: (full, (np.inf,) * count) for target in TARGETS}  # never leaving is always there
    choose = one_threshold if name == "shared" else ranking.rank_thresholds
    for mask in range(1, 2**count):
        open_exits = [index for index in range(count) if mask >> index & 1]
        # A training-free score that is asked and says no was paid for. A gate costs next to nothing to ask: an infinite
        # threshold closes it as well.
        if len(open_exits) < count and (name in ("gate", "shared") or len(open_exits) > 2):
            continue
        asked = [index in open_exits for index in range(count)]
        priced = np.array([costs.by_exit(c, asked) for c in contexts])[back][:, [*open_exits, count]]
        arrays = scores[:, open_exits], harms[:, open_exits], priced
        for target in TARGETS:
            picked = choose(*arrays, full, target, rows, GRID)
            cost = ranking.predicted(picked, *arrays, rows)[1]
            if cost < best[target][0]:
                thresholds = np.full(count, np.inf)
                thresholds[open_exits] = picked
                best[target] = (cost, tuple(thresholds))
    return [(target, thresholds) for target, (_, thresholds) in best.items()]


def one_threshold(scores, harms, costs, full_cost, risk, rows, grid) -> np.ndarray:
    """Returns one threshold for all exits [exits], of least cost with a mean harm of at most `risk`."""
    tried = [np.full(scores.shape[1], t) for t in (*np.quantile(scores, np.linspace(0, 1, 4 * grid)), np.inf)]
    rated = [(*ranking.predicted(thresholds, scores, harms, costs, rows), thresholds) for thresholds in tried]
    return min((entry for entry in rated if entry[0].mean() <= risk), key=lambda entry: entry[1])[2]


def costs_of(record: dict, name: str) -> Costs:
    """Returns the prices under a score: a training-free one has no gate, but may need the head's logits."""
    free, reads = name in SCORES[1:], name in SCORES[1:4]
    return Costs(record["shape"], [e | {"gate": 0, "reads_logits": reads} if free else e for e in record["exits"]])


def measured(record: dict, found: dict, name: str, thresholds: tuple, on: np.ndarray) -> dict:
    """Returns harm, relative FLOPs, and what saved how much, of thresholds on the tokens `on`."""
    policy, costs, exits = ExitPolicy(thresholds), costs_of(record, name), np.arange(len(thresholds))
    scores = found[name][on]
    taken = policy.choose(scores)
    asked = np.array([policy.asks(index) for index in exits]) & (exits <= taken[:, None])
    # A head is evaluated where its token leaves, and where its score reads the logits.
    headed = (exits == taken[:, None]) | asked & np.array([exit["reads_logits"] for exit in costs.exits])
    # Sooner or later a block head with K/V of its own catches up with every token.
    through = np.array([exit["own_kv"] for exit in costs.exits]) & np.isfinite(thresholds)
    rows, place = np.unique(found["row"][on], return_inverse=True)[1], found["place"][on]

    def table(values: np.ndarray, empty) -> np.ndarray:
        out = np.full((rows.max() + 1, place.max() + 1, *values.shape[1:]), empty, values.dtype)
        out[rows, place] = values
        return out

    trace = Trace(
        tuple(exit["depth"] for exit in record["exits"]),
        record["shape"]["layers"],
        table(taken, -1),
        table(np.where(asked, scores, np.nan), np.nan),
        table(found["context"][on], 0),
        table(headed, False),
        table((headed | through).astype(int), 0),
        np.zeros(rows.max() + 1, int),
    )
    price = costs.price(trace)
    harm = np.take_along_axis(np.pad(found["harm"][on], ((0, 0), (0, 1))), taken[:, None], 1)[:, 0]
    by_prompt = np.bincount(rows, harm) / np.bincount(rows)
    about = {"harm": float(by_prompt.mean()), "mean_depth": trace.mean_depth}
    return about | {"relative_flops": price.relative_flops, **price.saved}


def at_harm(line: list[dict], harm: float) -> dict:
    """Returns a line's figures at a measured harm, interpolated; never leaving has no harm and saves nothing."""
    line = sorted(line, key=lambda point: point["harm"])
    harms = [0.0, *(point["harm"] for point in line)]
    none = {"relative_flops": 1.0}
    values = {key: [none.get(key, 0.0), *(point[key] for point in line)] for key in PARTS}
    return {key: float(np.interp(harm, harms, values[key])) for key in PARTS}


def best_free(record: dict, harm: str) -> tuple[str, dict]:
    """Returns the training-free score that costs least at a harm, and its figures."""
    return min(((name, record["scores"][name]["at"][harm]) for name in SCORES[1:]), key=lambda s: s[1][PARTS[0]])


def summary(done: list[dict], screen: dict | None) -> str:
    """Returns the tables as Markdown."""
    first = [["variation", "tokens (different)", "seconds", "depth: agreement / no harm", *(f"FLOPs at harm {h:g}"
             for h in SHOWN), "depth, shortlist, rest at 0.01", "shared threshold at 0.01"]]  # fmt: skip
    second = [["variation", "AUC gate / best free, per exit", *(f"gate, best free at {h:g}" for h in SHOWN),
               "net depth at 0.01: gate / best free", "oracle", "of the oracle's saving at 0.01"]]  # fmt: skip
    for record in done:
        spent, gate, scores = record["training"], record["scores"]["gate"]["at"], record["scores"]
        parts = ", ".join(f"{100 * gate['0.01'][key]:.1f} %" for key in PARTS[1:])
        exits = "; ".join(f"{e['depth']}: {e['agreement']:.2f} / {e['no_harm']:.3f}" for e in record["about_exits"])
        tokens = f"{spent['tokens']:,} ({spent['different_tokens']:,})"
        first.append([record["name"], tokens, f"{spent['seconds']:.0f}", exits,
                      *(f"{gate[str(h)]['relative_flops']:.3f}" for h in SHOWN), parts,
                      f"{scores['shared']['at']['0.01']['relative_flops']:.3f}"])  # fmt: skip
        aucs = [(e["auc"]["gate"], max(e["auc"][n] or 0 for n in SCORES[1:])) for e in record["about_exits"]]
        free, oracle = {str(h): best_free(record, str(h)) for h in SHOWN}, scores["oracle"]["relative_flops"]
        net = [point["depth"] + point["overhead"] for point in (gate["0.01"], free["0.01"][1])]
        second.append([record["name"], ", ".join(f"{a or 0:.2f} / {b:.2f}" for a, b in aucs),
                       *(f"{gate[h]['relative_flops']:.3f}, {f['relative_flops']:.3f} ({n})"
                         for h, (n, f) in free.items()),
                       " / ".join(f"{100 * part:.1f} %" for part in net), f"{oracle:.3f}",
                       f"{(1 - gate['0.01']['relative_flops']) / max(1 - oracle, 1e-9):.2f}"])  # fmt: skip
    text = f"## Recipes\n\n{markdown(first)}\n\n## Gates\n\n{markdown(second)}\n"
    if screen:
        rows = [["rank of the preview", "entries", "share of the head's cost", "holds the full model's word"]]
        rows += [[str(r["rank"] or "fixed list"), str(r["entries"]), f"{r['head']:.3f}", f"{r['holds']:.4f}"]
                 for r in screen["table"]]  # fmt: skip
        text += f"\n## Shortlists\n\n{markdown(rows)}\n"
    return text


def markdown(rows: list[list[str]]) -> str:
    """Returns a table; the first row is its head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def axes_of(title: str, across: str, up: str):
    """Returns an empty picture and its axes."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    return figure, axes


def drawn(axes, record: dict, score: str, label: str, **style) -> None:
    """Draws the measured points of a score."""
    points = sorted((p["relative_flops"], p["harm"]) for p in record["scores"][score]["points"])
    axes.plot(*np.transpose([*points, (1.0, 0.0)]), marker=".", label=label, **style)


def frontiers(done: list[dict]) -> Figure:
    """Returns the picture of all variations under their own gates."""
    figure, axes = axes_of("Recipes, each with its own gates", "FLOPs per token, relative", "harm (teacher-forced)")
    for index, record in enumerate(done):
        drawn(axes, record, "gate", record["name"], linestyle=("-", "--", ":")[index // 10 % 3])
    axes.legend(fontsize="small")
    return figure


def gates(record: dict) -> Figure:
    """Returns the picture of all scores on one variation."""
    figure, axes = axes_of(f"Scores on {record['name']}", "FLOPs per token, relative", "harm (teacher-forced)")
    for name in (*SCORES, "shared"):
        drawn(axes, record, name, {"gate": "learned gate", "shared": "learned gate, one threshold"}.get(name, name))
    axes.axvline(record["scores"]["oracle"]["relative_flops"], color="black", linestyle=":", label="oracle, no harm")
    axes.legend()
    return figure


def over_tokens(done: list[dict]) -> Figure:
    """Returns the picture of what more tokens bring, one line per depth and kind of head."""
    figure, axes = axes_of("More tokens", "labelled tokens trained on", "share of tokens that leave without harm")
    lines: dict[tuple, list] = {}
    for record in done:
        for exit, about in zip(record["exits"], record["about_exits"], strict=True):
            weights = exit["head"] + sum(block["weights"] for block in exit["blocks"])
            place = lines.setdefault((exit["depth"], weights), [])
            place.append((max(record["training"]["tokens"], 1), about["no_harm"]))
    for (depth, weights), points in sorted(lines.items()):
        axes.plot(*np.transpose(sorted(points)), marker="o", label=f"depth {depth}, {weights / 1e6:.2f}M weights")
    axes.set_xscale("log")
    axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    main(CONFIG)
