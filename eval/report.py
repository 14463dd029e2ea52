"""Report what the certified operating points of a run cost, and what they do to answers, on prompts they never saw.

    python eval/report.py --run runs/demo --prompts runs/demo/text/prompts.json

Prompts are a .json file of {"select": [...], "certify": [...], "report": [...]} (as train/text.py writes). Full depth
and every certificate of train/calibrate.py answer the `report` part; the full model judges each token. In RUN/report:

    report.md      a table, one row per operating point, and one answer at full depth and with early exits
    frontier.png   harm against FLOPs: the trained exits, raw exits, and what was measured
    answer.html    the answer, each token coloured by the depth it took
    report.json    every figure, and where it comes from
    parts/         finished measurements; an interrupted run goes on after the last one
"""

import sys
from dataclasses import dataclass

from adaptive.checked import Checked, load_config


@dataclass
class ReportConfig(Checked):
    """What to report on, and how thoroughly.

    Attributes:
        run: folder of the trained and calibrated model
        prompts: .json file with the parts select, certify and report
        speed_prompts: number of report prompts that are timed, those with the longest answers
        speed_tokens: tokens generated for each of them
    """

    run: str
    prompts: str
    speed_prompts: int = 4
    speed_tokens: int = 32

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(1, "speed_prompts") + self._below(2, "speed_tokens")
        return found if self.prompts.endswith(".json") else [*found, f"`prompts` is {self.prompts}; give a .json file"]


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(ReportConfig)

import html
import json
import os
import time
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from tqdm import tqdm

from adaptive import certify, outcomes, ranking, survey
from adaptive.calibration import Certificate, rouge_l
from adaptive.config import ExitConfig
from adaptive.data import digest
from adaptive.model import EarlyExitModel
from adaptive.policy import ExitPolicy
from adaptive.prompts import encode, pieces, read_parts
from adaptive.provenance import provenance
from adaptive.runs import put, write_json
from adaptive.storage import model_digest

FULL = "full-depth"
# Of each exit, in a terminal and in a browser; a seventh exit begins again. The full depth has none.
COLOURS = [(208, "#ff8700"), (39, "#00afff"), (42, "#00d787"), (170, "#d75fd7"), (178, "#d7af00"), (203, "#ff5f5f")]
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>One answer, twice</title>
<style>:root{color-scheme:light dark} body{font:16px/1.6 system-ui;max-width:50em;margin:2em auto;padding:0 1em}
pre{white-space:pre-wrap;font:inherit}</style><h1>One answer, twice</h1>ANSWERS</html>"""


@dataclass
class Job:
    """What every measurement needs."""

    model: EarlyExitModel
    tokenizer: object
    certificates: dict[str, dict]  # by name, such as "risk-0.02"; an infinite threshold is null
    policies: dict[str, ExitPolicy]  # by name, full depth first
    selection: list[list[int]]  # token ids of the prompts that chose the thresholds
    prompts: list[list[int]]  # token ids of the report prompts
    settings: dict  # of train/calibrate.py
    made_with: dict  # what a finished part must have been made with
    parts: Path  # folder of the finished parts


def main(config: ReportConfig) -> dict:
    """Writes the report; returns what report.json holds."""
    job, folder, points = prepared(config), Path(config.run) / "report", {}
    report, names = made_by(job), job.certificates
    for name in tqdm(job.policies, desc="operating points", unit="point"):
        points[name] = part(job, name, {"certificate": names.get(name)}, measured, job.policies[name], points.get(FULL))
    longest = sorted(range(len(job.prompts)), key=lambda i: -len(points[FULL]["answers"][i]))[: config.speed_prompts]
    about = {"timed": longest, "tokens": config.speed_tokens, "points": names, "machine": report["machine"]}
    speed = part(job, "speed", about, timed, [job.prompts[i] for i in longest], config.speed_tokens)
    raw = part(job, "raw-exits", {"raw": "norm and full head"}, raw_line, job.selection)["line"]
    found = survey.Survey(**load_file(Path(config.run) / "calibration" / "survey.safetensors"))
    trained = frontier_line(found, job.model, job.settings)
    report["lines"] = {"trained exits": trained, "raw exits (final norm, LM head)": raw}
    report["points"] = [{"name": n, "certificate": names.get(n), **p["figures"], **speed[n]} for n, p in points.items()]
    report["shown"] = shown = answer_shown(job, points)
    summary, web = f"{table(report)}\n\n{notes(report)}", PAGE.replace("ANSWERS", painted(shown, "html"))
    text = f"# Report\n\n{summary}\n\n![Harm against FLOPs](frontier.png)\n\n````\n{painted(shown, 'plain')}\n````\n"
    put(folder / "frontier.png", lambda fresh: frontier(report).savefig(fresh, format="png", dpi=150))
    put(folder / "answer.html", lambda fresh: fresh.write_text(web, encoding="utf-8"))
    put(folder / "report.md", lambda fresh: fresh.write_text(text, encoding="utf-8"))
    write_json(folder / "report.json", report)
    style = "ansi" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else "plain"
    print(f"\n{summary}\n\n{painted(shown, style)}\n\nAll of this is in {folder}")
    return report


def prepared(config: ReportConfig) -> Job:
    """Returns the job; refuses what cannot be reported on before anything is measured."""
    found, parts = Path(config.run) / "calibration", Path(config.run) / "report" / "parts"
    paths = sorted(found.glob("risk-*.json")) + sorted(found.glob("budget-*.json"), reverse=True)
    if not paths or not all((found / name).exists() for name in ("settings.json", "survey.safetensors")):
        raise ValueError(f"{found} holds no certificates with their survey; run train/calibrate.py first")
    names, settings = ("select", "certify", "report"), json.loads((found / "settings.json").read_text())
    prompts = dict(zip(names, read_parts(config.prompts, *names), strict=True))
    if both := {str(p) for p in prompts["report"]} & {str(p) for p in prompts["select"] + prompts["certify"]}:
        raise ValueError(f"`report` of {config.prompts} has {len(both)} prompts of `select` or `certify`; remove these")
    model = EarlyExitModel.from_pretrained(config.run).to("cuda" if torch.cuda.is_available() else "cpu")
    weights, tokenizer = model_digest(model), certify.load_tokenizer(model)
    if warnings := [f"{path}: {warning}" for path in paths if (warning := Certificate.load(path).check(weights))]:
        raise ValueError("; ".join(warnings) + "; run train/calibrate.py again")
    certificates = {path.stem: json.loads(path.read_text()) for path in paths}
    policies = {FULL: ExitPolicy.full(model.num_exits)} | {
        n: ExitPolicy(c["thresholds"]) for n, c in certificates.items()
    }
    selection, ids = (encode(prompts[name], tokenizer) for name in ("select", "report"))
    made_with = {"prompts": digest(repr([selection, ids]).encode()), "settings": settings, "torch": torch.__version__}
    return Job(model, tokenizer, certificates, policies, selection, ids, settings, made_with, parts)


def part(job: Job, name: str, about: dict, make, *args) -> dict:
    """Returns `make(job, *args)`; from its file, if it was made with the same before."""
    path, made_with = job.parts / f"{name}.json", job.made_with | about
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("made_with") != made_with:
        found = make(job, *args) | {"made_with": made_with}
        write_json(path, found)
    return found


def measured(job: Job, policy: ExitPolicy, full: dict | None) -> dict:
    """Returns what free generation costs and does; `full`: the same of the full depth, None for itself."""
    harm, tolerance, *sizes = (job.settings[name] for name in ("harm", "tolerance", "max_new_tokens", "batch_size"))
    outcome = outcomes.observe(job.model, job.prompts, policy, *sizes)
    said, trace, price = outcome.answers, outcome.trace, job.model.costs.price(outcome.trace)
    reference, perplexity = full["answers"] if full else said, float(np.exp(np.nanmean(outcome.nll)))
    harms = survey.loss_per_prompt(harm, tolerance, outcome, reference)
    figures = {
        "harm": float(harms.mean()),
        "standard_error": float(harms.std(ddof=len(harms) > 1) / np.sqrt(len(harms))),
        "disagreement": float((outcome.regret[~np.isnan(outcome.regret)] > 0).mean()),
        "rouge_l": float(np.mean([rouge_l(*pair) for pair in zip(said, reference, strict=True)])),
        "perplexity": perplexity,
        "relative_perplexity": perplexity / full["figures"]["perplexity"] if full else 1.0,
        "mean_depth": trace.mean_depth,
        "shares": trace.shares,
        "relative_flops": price.relative_flops,
        "saved": price.saved,
    }
    return {"figures": figures, "answers": said, "taken": [row[row >= 0].tolist() for row in trace.taken]}


def timed(job: Job, prompts: list[list[int]], tokens: int) -> dict:
    """Returns decoded tokens/s at batch 1, prefill left out, by policy: prompt after prompt, policies shuffled."""
    rates, generator = {name: [] for name in job.policies}, np.random.default_rng(0)
    asked = [prompts[0], *prompts]  # the first one warms up
    rounds = [(prompt, name) for prompt in asked for name in generator.permutation(list(rates)).tolist()]
    for prompt, name in tqdm(rounds, desc="timing", unit="answer"):
        times, ids = [], torch.tensor([prompt], device=job.model.device)
        clock = SimpleNamespace(put=lambda _, times=times: times.append(time.perf_counter()), end=lambda: None)
        # The same number of tokens from everyone: a short answer would be timed on shorter contexts.
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "policy": job.policies[name]}
        job.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
        rates[name].append((tokens - 1) / (times[-1] - times[1]))  # the prompt was put first
    ratios = {name: np.divide(rates[name], rates[FULL])[1:] for name in rates}
    spread = {name: [float(of(ratio)) for of in (np.median, np.min, np.max)] for name, ratio in ratios.items()}
    return {name: {"tokens_per_second": rates[name][1:], "relative_speed": spread[name]} for name in rates}


def raw_line(job: Job, prompts: list[list[int]]) -> dict:
    """Returns the frontier of untrained exits at the same depths: final norm, LM head, its largest probability."""
    depths = [depth for depth in job.model.depths if depth < job.model.view.num_layers]
    config = ExitConfig(depths, head="norm", gate="max_prob", blocks=job.model.exit_config.blocks)
    raw = EarlyExitModel.from_backbone(job.model.backbone, config)
    found = survey.survey(raw, prompts, job.settings["max_new_tokens"], job.settings["batch_size"])
    return {"line": frontier_line(found, raw, job.settings)}


def frontier_line(found: survey.Survey, model: EarlyExitModel, settings: dict) -> list:
    """Returns undominated [relative FLOPs, harm] of a survey, cheapest first; an exit nobody takes costs nothing."""
    harms, ladder = found.harms(settings["harm"], settings["tolerance"]), []
    costs, count, priced, points = model.costs, model.num_exits, {}, [(1.0, 0.0)]
    while not ladder or ladder[-1] < found.costs[:, -1].max():
        ladder.append(costs.by_exit(len(ladder) + 1)[-1])
    # The survey does not keep the contexts; they are read off the costs.
    contexts, back = np.unique(1 + np.searchsorted(ladder, found.costs[:, -1]), return_inverse=True)
    for exits in [list(range(count)), *([index] for index in range(count))]:
        arrays = found.scores[:, exits], harms[:, exits], found.costs[:, [*exits, count]]
        for point in ranking.frontier(*arrays, found.full_cost, found.rows):
            thresholds = np.full(count, np.inf)
            thresholds[exits] = point.thresholds
            asked = tuple(thresholds < np.inf)
            if asked not in priced:
                priced[asked] = np.stack([costs.by_exit(context, asked) for context in contexts])[back]
            harm, cost = ranking.predicted(thresholds, found.scores, harms, priced[asked], found.rows)
            points.append((float(cost / found.full_cost), float(harm.mean())))
    points.sort()
    return [list(p) for i, p in enumerate(points) if all(p[1] < cheaper[1] - 1e-12 for cheaper in points[:i])]


def table(report: dict) -> str:
    """Returns the operating points as a Markdown table."""
    names = ["target", "certified harm", f"thresholds at {report['exits']['depths']}", "mean depth", "FLOPs/token"]
    names += ["saved by depth, shortlist, rest", "tokens/s", "harm ± s.e.", "ROUGE-L", "perplexity"]
    rows = [names, ["---"] * len(names)]
    for point, certificate in ((point, point["certificate"]) for point in report["points"]):
        bound = f"<= {certificate['certified']:.4f}" if certificate else "-"
        cuts = ["never" if t is None else f"{t:.3f}" for t in certificate["thresholds"]] if certificate else "-"
        row = [point["name"], bound, ", ".join(cuts), f"{point['mean_depth']:.1f}", f"{point['relative_flops']:.3f}"]
        row += [", ".join(f"{100 * share:.1f} %" for share in point["saved"].values())]
        row += ["{:.2f} ({:.2f}-{:.2f})".format(*point["relative_speed"])]
        row += [f"{point['harm']:.4f} ± {point['standard_error']:.4f}", f"{point['rouge_l']:.3f}"]
        rows += [[*row, f"{point['relative_perplexity']:.3f}"]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def notes(report: dict) -> str:
    """Returns how the figures of the table are to be read."""
    settings, full, where = report["calibration"], report["points"][0], report["machine"]
    rate, rounds = np.median(full["tokens_per_second"]), len(full["tokens_per_second"])
    return f"""\
Free greedy generation, up to {settings["max_new_tokens"]} tokens for each of {report["prompts"]} held-out prompts.
FLOPs, tokens/s and perplexity (of the answers, under the full model: {full["perplexity"]:.2f} at full depth) are
relative to full depth; ROUGE-L is against its answers. Harm: {report["harm"]}; each bound holds with probability
{1 - settings["delta"]:g}. Floor: full depth strictly disagrees with itself, decoding against one pass, on
{full["disagreement"]:.2%} of tokens. tokens/s: decoding at batch 1, median (range) of {rounds} interleaved rounds;
full depth {rate:.1f} on {where["device"]}, {where["threads"]} of {where["cores"]} threads, {where["cpu"]}."""


def frontier(report: dict) -> Figure:
    """Returns the picture of harm against FLOPs."""
    figure, (full, *points) = Figure(figsize=(8, 5.2), layout="constrained"), report["points"]
    axes = figure.subplots()
    for (name, line), style in zip(report["lines"].items(), ({"color": "#0072b2"}, {"color": "#888", "ls": "--"})):
        axes.plot(*np.transpose(line), **style, marker=".", drawstyle="steps-post", label=name)
    x, y, errors = ([point[key] for point in points] for key in ("relative_flops", "harm", "standard_error"))
    label = f"certified, measured on {report['prompts']} other prompts (± standard error)"
    axes.errorbar(x, y, errors, fmt="o", color="#d55e00", capsize=3, label=label)
    for index, (point, *place) in enumerate(zip(points, x, y)):
        axes.annotate(point["name"], place, (8, 5 - 16 * (index % 2)), textcoords="offset points", fontsize=8)
    axes.plot(1, full["harm"], "k*", markersize=12, label=FULL, clip_on=False, zorder=5)
    ticks = [0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set(ylim=(0, 1), yticks=ticks, yticklabels=ticks, xlabel="FLOPs per token, relative to full depth")
    axes.set(ylabel=f"mean harm ({report['harm']})", title=f"{Path(report['model']).name}: harm against FLOPs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    return figure


def answer_shown(job: Job, points: dict) -> dict:
    """Returns the longest answer with early exits, of the cheapest point certified to a risk, token by token."""
    layers, early = job.model.view.num_layers, job.model.num_exits
    figures = {name: points[name]["figures"] for name in job.certificates}
    worth = {n: (f["shares"][-1] == 1, n.startswith("budget"), f["relative_flops"]) for n, f in figures.items()}
    best = min(worth, key=worth.get)
    index = max(range(len(job.prompts)), key=lambda i: (min(taken := points[best]["taken"][i]) < early, len(taken)))
    marks = [f"{depth}, shortlist" if depth == layers else str(depth) for depth in job.model.depths] + [str(layers)]
    shown = {"index": index, "prompt": job.tokenizer.decode(job.prompts[index]), "marks": marks, "answers": {}}
    for name in (FULL, best):
        ids = points[name]["answers"][index]
        shown["answers"][name] = list(zip(pieces(job.tokenizer, ids), points[name]["taken"][index], strict=True))
    return shown


def painted(shown: dict, style: str) -> str:
    """Returns the answers as "plain" text with the depth before tokens that took it, in "ansi" colours, or "html"."""

    def paint(exit: int, text: str) -> str:
        mark, (code, back), full = shown["marks"][exit], COLOURS[exit % len(COLOURS)], exit == len(shown["marks"]) - 1
        if style == "html":
            return (
                f'<span title="depth {mark}"{"" if full else f" style=background:{back}66"}>{html.escape(text)}</span>'
            )
        return f"[{mark}]{text}" if style == "plain" else text if full else f"\x1b[38;5;{code}m{text}\x1b[0m"

    legend = ", ".join(paint(exit, f"depth {mark}") for exit, mark in enumerate(shown["marks"]))
    prompt = html.escape(shown["prompt"]) if style == "html" else shown["prompt"]
    parts = {"depths": legend, f"report prompt {shown['index']}": prompt}
    for name, tokens in shown["answers"].items():
        runs = groupby(tokens, key=lambda token: token[1])
        parts[name] = "".join(paint(exit, "".join(piece for piece, _ in run)) for exit, run in runs)
    form = "<h2>{}</h2><pre>{}</pre>" if style == "html" else "--- {}\n{}"
    return "\n".join(form.format(name, text) for name, text in parts.items())


def made_by(job: Job) -> dict:
    """Returns where the figures come from."""
    unit = f" above {job.settings['tolerance']} nats" if job.settings["harm"] == "regret" else ""
    return provenance("matplotlib") | {
        "model": str(job.model.view.inner.name_or_path),
        "exits": job.model.exit_config.to_dict(),
        "calibration": job.settings,
        "harm": job.settings["harm"] + unit,
        "prompts": len(job.prompts),
        "selection_prompts": len(job.selection),
        "prompts_digest": job.made_with["prompts"],
    }


if __name__ == "__main__":
    main(CONFIG)
