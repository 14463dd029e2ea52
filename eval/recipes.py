"""Tables and pictures of a study: what recipes save at equal harm, how far their gates are from an oracle.

    python eval/recipes.py --study runs/study --output results/recipes --scaling quarter,half,all

Thresholds are chosen on half of the prompts and measured on the other half, then the other way round; which exits to
close is part of the choice. Every score pays what it costs: a training-free one has no gate, but most must evaluate an
exit's head before they know whether to leave. Figures at equal harm are interpolated between measured points. The
oracle leaves at the earliest exit that does no harm. In the output folder:

    NAME.json              every figure of a variation; not worked out again while the study's file is the same
    screen.json            copied from the study
    scaling.json           lines fitted to the variations named by `scaling`
    spacing.json           some of the exits of one variation without the others
    summary.md             the tables
    frontier.png           harm against FLOPs of the ten that save most, with their own gates
    gates.png              harm against FLOPs of each score, on one variation
    tokens.png             the fitted lines
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from adaptive.checked import Checked, load_config


@dataclass
class RecipesConfig(Checked):
    """What to draw.

    Attributes:
        study: folder that eval/study.py wrote
        output: folder for tables and pictures
        shown: variation whose scores and sets of exits are compared; none = the one that saves most
        scaling: variations that differ in the amount of text alone; a line is fitted to them
    """

    study: str
    output: str
    shown: str | None = None
    scaling: list[str] = field(default_factory=list)

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
from adaptive.provenance import provenance
from adaptive.runs import put, write_json

SCORES = ("gate", "max_prob", "margin", "entropy", "similarity")
TARGETS = (0.005, 0.01, 0.02, 0.04, 0.08)  # harms that thresholds are chosen for
SHOWN = (0.005, 0.01, 0.02, 0.05)  # measured harms that figures are interpolated to
GRID = 64  # candidate thresholds per exit
GOAL = 0.76  # relative FLOPs that issue 3 asks of the long recipe
PARTS = ("relative_flops", "depth", "shortlist", "overhead")


def main(config: RecipesConfig) -> list[dict]:
    """Writes everything; returns the figures of the variations."""
    study, folder, done = Path(config.study), Path(config.output), []
    paths = [path for path in sorted(study.glob("*.json")) if path.with_suffix(".safetensors").exists()]
    if not paths:
        raise ValueError(f"`study` is {study}, which holds no judged variation; run eval/study.py first")
    for path in tqdm(paths, desc="variations", unit="run"):
        record, earlier = (json.loads(p.read_text()) if p.exists() else {} for p in (path, folder / path.name))
        if record.items() <= earlier.items() and {"oracle", *SCORES, "shared"} <= set(earlier["scores"]):
            done.append(earlier)
            continue
        found = load_file(path.with_suffix(".safetensors"))
        found["harm"] = (found["regret"] > record["tolerance"]).astype(float)
        record |= {"tokens": len(found["row"]), "prompts": len(np.unique(found["row"]))}
        record |= {"about_exits": about_exits(record, found), "scores": compared(record, found)}
        write_json(folder / path.name, record)
        done.append(record)
    done.sort(key=lambda record: record["scores"]["gate"]["at"]["0.01"]["relative_flops"])
    chosen = next((record for record in done if record["name"] == config.shown), done[0])
    screen = json.loads((study / "screen.json").read_text()) if (study / "screen.json").exists() else None
    of_line = [record for name in config.scaling for record in done if record["name"] == name]
    lines = scaled(of_line) if len(of_line) > 1 else []
    spaced = spacing(chosen, load_file(study / f"{chosen['name']}.safetensors"))
    for name, found in (("screen", screen), ("scaling", lines and {"lines": lines}), ("spacing", spaced)):
        if found:
            write_json(folder / f"{name}.json", found if name == "screen" else found | provenance())
    text = summary(done) + more(screen, lines, spaced)
    put(folder / "summary.md", lambda fresh: fresh.write_text(text))
    for name, picture in (("frontier", frontiers(done)), ("gates", gates(chosen)), ("tokens", over_tokens(lines))):
        put(folder / f"{name}.png", lambda fresh, picture=picture: picture.savefig(fresh, format="png", dpi=120))
    print(text)
    return done


def about_exits(record: dict, found: dict) -> list[dict]:
    """Returns, for each exit, how often it is right and how well each score tells when."""
    out = []
    for index, exit in enumerate(record["exits"]):
        fine = found["harm"][:, index] == 0
        aucs = {name: ranking.auc(found[name][:, index], fine) for name in SCORES}
        right = {"agreement": float(found["agrees"][:, index].mean()), "no_harm": float(fine.mean())}
        out.append({"depth": exit["depth"], **right, "auc": aucs})
    return out


def compared(record: dict, found: dict, names: tuple = (*SCORES, "shared")) -> dict:
    """Returns measured points and figures at equal harm for each score and one shared threshold, and the oracle's."""
    found = found | {"shared": found["gate"], "oracle": 1.0 - found["harm"]}
    out = {"oracle": measured(record, found, "oracle", (0.5,) * len(record["exits"]), np.ones(len(found["row"]), bool))}
    for name in names:
        pairs: dict[float, list] = {target: [] for target in TARGETS}
        for chosen in (found["row"] % 2 == 0, found["row"] % 2 == 1):
            for target, thresholds in choices(record, found, name, chosen):
                pairs[target].append(measured(record, found, name, thresholds, ~chosen))
        line = [{key: float(np.mean([point[key] for point in pair])) for key in pair[0]} for pair in pairs.values()]
        out[name] = {"points": line, "at": {str(harm): at_harm(line, harm) for harm in SHOWN}}
    return out


def spacing(record: dict, found: dict) -> dict:
    """Returns what some exits do without the others: each one beside the last, every second one, all of them."""
    found, last = found | {"harm": (found["regret"] > record["tolerance"]).astype(float)}, len(record["exits"]) - 1
    kept = [[last], *([index, last] for index in range(last)), sorted({*range(0, last, 2), last})]
    kept += [sorted({*range(1, last, 2), last}), list(range(last + 1))]
    out = []
    for some in [keep for index, keep in enumerate(kept) if keep not in kept[:index]]:
        part = found | {name: np.ascontiguousarray(found[name][:, some]) for name in ("harm", "gate")}
        cut = record | {"exits": [record["exits"][index] for index in some]}
        scores = compared(cut, part, ("gate",))
        oracle = scores["oracle"]["relative_flops"]
        out.append({"depths": [exit["depth"] for exit in cut["exits"]], "oracle": oracle, "at": scores["gate"]["at"]})
    return {"variation": record["name"], "sets": out}


def scaled(done: list[dict]) -> list[dict]:
    """Returns lines a + b log10(different tokens trained on), fitted in squares: share of harmless tokens at each
    depth, and relative FLOPs at 2 % harm and under the oracle, with the tokens that a line wants for `GOAL`."""
    tokens = [record["training"]["different_tokens"] for record in done]
    values = {f"no harm at {exit['depth']}": [record["about_exits"][index]["no_harm"] for record in done]
              for index, exit in enumerate(done[0]["exits"])}  # fmt: skip
    values["FLOPs at harm 0.02"] = [record["scores"]["gate"]["at"]["0.02"]["relative_flops"] for record in done]
    values["FLOPs under the oracle"] = [record["scores"]["oracle"]["relative_flops"] for record in done]
    out = []
    for name, line in values.items():
        slope, start = np.polyfit(np.log10(tokens), line, 1)
        rest = float(np.std(line - (start + slope * np.log10(tokens))))
        goal = float((GOAL - start) / slope) if name.startswith("FLOPs") and slope else None
        out.append({"figure": name, "a": float(start), "b": float(slope), "residual": rest, "tokens": tokens,
                    "values": line, "log10_tokens_for_goal": goal})  # fmt: skip
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
    about = {"harm": float((np.bincount(rows, harm) / np.bincount(rows)).mean()), "mean_depth": trace.mean_depth}
    return about | {"relative_flops": price.relative_flops, **price.saved}


def at_harm(line: list[dict], harm: float) -> dict:
    """Returns a line's figures at a measured harm, interpolated; never leaving has no harm and saves nothing."""
    line = sorted(line, key=lambda point: point["harm"])
    harms = [0.0, *(point["harm"] for point in line)]
    none = {"relative_flops": 1.0}
    values = ([none.get(key, 0.0), *(point[key] for point in line)] for key in PARTS)
    return {key: float(np.interp(harm, harms, value)) for key, value in zip(PARTS, values, strict=True)}


def summary(done: list[dict]) -> str:
    """Returns the tables of variations and of their gates as Markdown."""
    first = [["variation", "tokens (different)", "CPU seconds", "depth: agreement / no harm", *(f"FLOPs at harm {h:g}"
             for h in SHOWN), "depth, shortlist, rest at 0.01", "shared threshold at 0.01"]]  # fmt: skip
    second = [["variation", "AUC gate / best free, per exit", *(f"gate, best free at {h:g}" for h in SHOWN),
               "net depth at 0.01: gate / best free", "oracle", "of the oracle's saving at 0.01"]]  # fmt: skip
    for record in done:
        spent, gate, scores = record["training"], record["scores"]["gate"]["at"], record["scores"]
        parts = ", ".join(f"{100 * gate['0.01'][key]:.1f} %" for key in PARTS[1:])
        exits = "; ".join(f"{e['depth']}: {e['agreement']:.2f} / {e['no_harm']:.3f}" for e in record["about_exits"])
        tokens = f"{spent['tokens']:,} ({spent['different_tokens']:,})"
        first.append([record["name"], tokens, f"{spent['cpu_seconds']:.0f}", exits,
                      *(f"{gate[str(h)]['relative_flops']:.3f}" for h in SHOWN), parts,
                      f"{scores['shared']['at']['0.01']['relative_flops']:.3f}"])  # fmt: skip
        aucs = [(e["auc"]["gate"], max(e["auc"][n] or 0 for n in SCORES[1:])) for e in record["about_exits"]]
        oracle = scores["oracle"]["relative_flops"]
        free = {h: min(((n, scores[n]["at"][h]) for n in SCORES[1:]), key=lambda s: s[1][PARTS[0]]) for h in gate}
        net = [point["depth"] + point["overhead"] for point in (gate["0.01"], free["0.01"][1])]
        second.append([record["name"], ", ".join(f"{a or 0:.2f} / {b:.2f}" for a, b in aucs),
                       *(f"{gate[h]['relative_flops']:.3f}, {f['relative_flops']:.3f} ({n})"
                         for h, (n, f) in free.items()),
                       " / ".join(f"{100 * part:.1f} %" for part in net), f"{oracle:.3f}",
                       f"{(1 - gate['0.01']['relative_flops']) / max(1 - oracle, 1e-9):.2f}"])  # fmt: skip
    return f"## Recipes\n\n{markdown(first)}\n\n## Gates\n\n{markdown(second)}\n"


def more(screen: dict | None, lines: list[dict], spaced: dict) -> str:
    """Returns the tables of shortlists, lines and sets of exits as Markdown."""
    rows = [["exits", *(f"FLOPs at harm {h:g}" for h in SHOWN), "oracle"]]
    rows += [[", ".join(map(str, one["depths"])), *(f"{one['at'][str(h)]['relative_flops']:.3f}" for h in SHOWN),
              f"{one['oracle']:.3f}"] for one in spaced["sets"]]  # fmt: skip
    text = f"\n## Exits of {spaced['variation']}\n\n{markdown(rows)}\n"
    if lines:
        rows = [["figure", "line in t = different tokens", "residual", "measured", f"log10 t for {GOAL}"]]
        rows += [[line["figure"], f"{line['a']:.3f} {line['b']:+.4f} log10 t", f"{line['residual']:.4f}",
                  ", ".join(f"{v:.3f} at {t:,}" for t, v in zip(line["tokens"], line["values"], strict=True)),
                  "" if line["log10_tokens_for_goal"] is None else f"{line['log10_tokens_for_goal']:.1f}"]
                 for line in lines]  # fmt: skip
        text += f"\n## Scaling\n\n{markdown(rows)}\n"
    if screen:
        rows = [["rank of the preview", "entries", "share of the head's cost", "holds the full model's word"]]
        rows += [[str(r["rank"] or "fixed list"), str(r["entries"]), f"{r['head']:.3f}", f"{r['holds']:.4f}"]
                 for r in screen["table"]]  # fmt: skip
        text += f"\n## Shortlists\n\n{markdown(rows)}\n"
    return text


def markdown(rows: list[list[str]]) -> str:
    """Returns a table; the first row is its head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


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
    """Returns the picture of the ten variations that save most under their own gates."""
    figure, axes = axes_of("Recipes, each with its own gates", "FLOPs per token, relative", "harm (teacher-forced)")
    for record in done[:10]:
        drawn(axes, record, "gate", record["name"])
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


def over_tokens(lines: list[dict]) -> Figure:
    """Returns the picture of what more text brings: measured points, and the lines fitted to them."""
    figure, axes = axes_of("More text, one pass over it", "different tokens trained on", "share of tokens, or of FLOPs")
    for index, line in enumerate(lines):
        ends = np.array([min(line["tokens"]), 30 * max(line["tokens"])])
        axes.plot(ends, line["a"] + line["b"] * np.log10(ends), linestyle=":", color=f"C{index}")
        axes.plot(line["tokens"], line["values"], "o", color=f"C{index}", label=line["figure"])
    axes.set_xscale("log")
    axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    main(CONFIG)
