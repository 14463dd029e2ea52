"""Report what the certified operating points of a run cost, and what they do to answers, on prompts they never saw.

    python eval/report.py --run runs/demo --prompts runs/demo/text/prompts.json

Prompts are a .json file of {"select": [...], "certify": [...], "report": [...]} (as train/text.py writes). Full depth
and every certificate of train/calibrate.py answer the `report` part, and the full model judges each token. In RUN/report:

    report.md      a table, one row per operating point, and one answer at full depth and with early exits
    frontier.png   harm against FLOPs: the trained exits, raw exits, and what was measured
    answer.html    the answer, each token coloured by the depth it took
    report.json    every figure and where it comes from
    parts/         finished measurements; an interrupted run goes on after the last one
"""

import sys
from dataclasses import asdict, dataclass

from adaptive.config import Checked, load_config


@dataclass
class ReportConfig(Checked):
    """What to report on, and how thoroughly.

    Attributes:
        run: folder of the trained and calibrated model
        prompts: .json file with the parts select, certify and report
        max_new_tokens: length of the answers; none = the length that was certified
        batch_size: rows generated at once
        raw_prompts: number of selection prompts on which raw exits are surveyed
        speed_prompts: number of report prompts that are timed, one by one
        speed_tokens: tokens generated for each of them
    """

    run: str
    prompts: str
    max_new_tokens: int | None = None
    batch_size: int = 32
    raw_prompts: int = 24
    speed_prompts: int = 4
    speed_tokens: int = 48

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(1, "max_new_tokens", "batch_size", "raw_prompts", "speed_prompts")
        return found + self._below(2, "speed_tokens")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(cls=ReportConfig)

import colorsys
import html
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from tqdm import tqdm

from adaptive import certify, ranking
from adaptive.calibration import Certificate, rouge_l
from adaptive.config import ExitConfig
from adaptive.data import digest
from adaptive.model import EarlyExitModel
from adaptive.policy import ExitPolicy
from adaptive.prompts import encode
from adaptive.runs import put, write_json
from adaptive.storage import model_digest

FULL = "full depth"


@dataclass
class Job:
    """What every measurement needs.

    Attributes:
        model, tokenizer: of the run.
        certificates: by name, such as "risk-0.02".
        policies: by name, the full depth first.
        prompts: the parts as they were given.
        ids: token ids of the report prompts.
        harm, tolerance, max_new_tokens, batch_size: as in `certify.calibrate`.
        made_with: what makes a finished part of this report usable again.
        parts: folder of the finished parts.
    """

    model: EarlyExitModel
    tokenizer: object
    certificates: dict[str, Certificate]
    policies: dict[str, ExitPolicy]
    prompts: dict[str, list]
    ids: list[list[int]]
    harm: str
    tolerance: float
    max_new_tokens: int
    batch_size: int
    made_with: dict
    parts: Path


def main(config: ReportConfig) -> dict:
    """Writes the report and returns what report.json holds."""
    folder = Path(config.run) / "report"
    job = prepared(config, folder / "parts")
    points = {}
    for name, policy in tqdm(job.policies.items(), desc="operating points", unit="point"):
        reference = points[FULL]["answers"] if points else None
        points[name] = part(job, name.replace(" ", "-"), {"thresholds": strict(policy.thresholds)},
                            lambda p=policy, r=reference: measured(job, p, r))  # fmt: skip
    order = sorted(range(len(job.ids)), key=lambda i: -len(points[FULL]["answers"][i]))[: config.speed_prompts]
    threads = {"threads": torch.get_num_threads(), "machine": machine()}
    asked = {"prompts": order, "tokens": config.speed_tokens, "points": list(map(strict, thresholds_of(job)))}
    speed = part(job, "speed", asked | threads, lambda: timed(job, [job.ids[i] for i in order], config.speed_tokens))
    chosen = job.prompts["select"][: config.raw_prompts]
    about = {"selection": digest(repr(chosen).encode())}
    raw = part(job, "raw", about, lambda: {"line": raw_line(job, encode(chosen, job.tokenizer))})
    lines = {"trained": trained_line(job, Path(config.run)), "raw": raw["line"]}
    shown = answer_shown(job, points)
    report = {**provenance(job, config), **threads, "n": len(job.ids), "harm": job.harm, "tolerance": job.tolerance,
              "max_new_tokens": job.max_new_tokens, "floor": points[FULL]["disagreement"], "lines": lines,
              "raw_prompts": len(chosen), "points": [row(job, n, p, speed, points[FULL]) for n, p in points.items()],
              "shown": shown}  # fmt: skip
    drawn = frontier_figure(report, [p["harms"] for p in points.values()])
    put(folder / "frontier.png", lambda fresh: drawn.savefig(fresh, format="png", dpi=150))
    put(folder / "answer.html", lambda fresh: fresh.write_text(answer_page(shown), encoding="utf-8"))
    text = "\n".join(["# Report", "", table(report), "", notes(report), "", "![frontier](frontier.png)", ""])
    put(folder / "report.md", lambda fresh: fresh.write_text(text + answers_text(shown, False), encoding="utf-8"))
    write_json(folder / "report.json", report)
    print(f"\n{table(report)}\n\n{notes(report)}\n\n{answers_text(shown, coloured())}\n\nAll of it is in {folder}")
    return report


def prepared(config: ReportConfig, parts: Path) -> Job:
    """Returns the job; refuses what it cannot report on, before anything is measured."""
    found = Path(config.run) / "calibration"
    paths = sorted([*found.glob("risk-*.json"), *found.glob("budget-*.json")], key=lambda path: (
        path.stem.startswith("budget"), float(path.stem.split("-", 1)[1])))  # fmt: skip
    if missing := [name for name in ("settings.json", "survey.safetensors") if not (found / name).exists()] + (
        [] if paths else ["certificates"]
    ):
        raise ValueError(f"{found} lacks {', '.join(missing)}; run train/calibrate.py --run {config.run} first")
    prompts = json.loads(Path(config.prompts).read_text())
    if missing := [name for name in ("select", "certify", "report") if not prompts.get(name)]:
        raise ValueError(f"`prompts`={config.prompts} lacks {missing}; it has {sorted(prompts)}; train/text.py writes all")
    if both := {str(p) for p in prompts["report"]} & {str(p) for p in prompts["select"] + prompts["certify"]}:
        raise ValueError(f"{len(both)} prompts in `report` of {config.prompts} are in `select` or `certify` too, such as "
                         f"{sorted(both)[0][:60]!r}; what chose or certified cannot report: remove them")  # fmt: skip
    settings = json.loads((found / "settings.json").read_text())
    model = EarlyExitModel.from_pretrained(config.run, dtype="float32")
    certificates, weights = {path.stem: Certificate.load(path) for path in paths}, model_digest(model)
    problems = [f"{name}: {warning}" for name, c in certificates.items() if (warning := c.check(weights))]
    problems += [f"{name} is of harm {c.harm}, the calibration of {settings['harm']}" for name, c in certificates.items()
                 if c.harm != settings["harm"]]  # fmt: skip
    if problems:
        raise ValueError("; ".join(problems) + f"; run train/calibrate.py --run {config.run} again")
    tokenizer = certify.load_tokenizer(model)
    ids = encode(prompts["report"], tokenizer)
    new = config.max_new_tokens or settings["max_new_tokens"]
    made_with = {"model": weights, "prompts": digest(repr(ids).encode()), "max_new_tokens": new, "torch": version("torch"),
                 "batch_size": config.batch_size, "harm": settings["harm"], "tolerance": settings["tolerance"]}  # fmt: skip
    policies = {FULL: ExitPolicy.full(model.num_exits)} | {n: ExitPolicy(c.thresholds) for n, c in certificates.items()}
    return Job(model, tokenizer, certificates, policies, prompts, ids, settings["harm"], settings["tolerance"], new,
               config.batch_size, made_with, parts)  # fmt: skip


def part(job: Job, name: str, about: dict, make: Callable[[], dict]) -> dict:
    """Returns a finished part of the report from its file, or makes it and writes the file."""
    path, made_with = job.parts / f"{name}.json", job.made_with | about
    if path.exists() and (found := json.loads(path.read_text())).pop("made_with") == made_with:
        return found
    found = make()
    write_json(path, {"made_with": made_with, **found})
    return found


def strict(values) -> list:
    """Returns numbers as strict JSON has them: null for infinity."""
    return [None if math.isinf(value) else float(value) for value in values]


def thresholds_of(job: Job) -> list[tuple]:
    """Returns the thresholds of every policy."""
    return [policy.thresholds for policy in job.policies.values()]


def measured(job: Job, policy: ExitPolicy, reference: list | None) -> dict:
    """Returns what free generation under a policy costs and does; `reference` are the full depth's answers, None for
    the full depth itself."""
    outcome = certify.observe(job.model, job.ids, policy, job.max_new_tokens, job.batch_size)
    reference = outcome.answers if reference is None else reference
    harms = certify.loss_per_prompt(job.harm, job.tolerance, outcome, reference)
    price, trace = job.model.costs.price(outcome.trace), outcome.trace
    rouge = [rouge_l(ours, full) for ours, full in zip(outcome.answers, reference, strict=True)]
    return {
        "mean_harm": float(harms.mean()),
        "standard_error": float(harms.std(ddof=1) / math.sqrt(len(harms))) if len(harms) > 1 else 0.0,
        "disagreement": float((outcome.regret[~np.isnan(outcome.regret)] > 0).mean()),
        "rouge_l": float(np.mean(rouge)),
        "perplexity": float(np.exp(np.nanmean(outcome.nll))),
        "mean_depth": trace.mean_depth,
        "shares": trace.shares,
        "tokens": int(trace.valid.sum()),
        "relative_flops": price.relative_flops,
        "relative_bytes": price.relative_bytes,
        "saved": price.saved,
        "harms": harms.tolist(),
        "answers": outcome.answers,
        "taken": [taken[valid].tolist() for taken, valid in zip(trace.taken, trace.valid, strict=True)],
    }


class Clock:
    """A streamer that notes when each token came; the prompt counts as the first."""

    def __init__(self):
        self.times = []

    def put(self, ids: torch.Tensor) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing."""


def timed(job: Job, prompts: list[list[int]], tokens: int) -> dict:
    """Returns tokens/s of every policy on every prompt, in turn, alone in the batch; the prefill is left out."""
    pad = job.model.generation_config.pad_token_id or 0

    def rate(policy: ExitPolicy, prompt: list[int], tokens: int) -> float:
        ids, clock = torch.tensor([prompt], device=job.model.device), Clock()
        # Every run makes the same number of tokens, so that none is timed on a shorter context.
        job.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                           min_new_tokens=tokens, pad_token_id=pad, policy=policy, streamer=clock)  # fmt: skip
        return (tokens - 1) / (clock.times[-1] - clock.times[1])

    for policy in job.policies.values():
        rate(policy, prompts[0], min(8, tokens))
    rates = {name: [] for name in job.policies}
    with tqdm(total=len(prompts) * len(rates), desc="timing", unit="run") as bar:
        for prompt in prompts:
            for name, policy in job.policies.items():
                rates[name].append(rate(policy, prompt, tokens))
                bar.update()
    return {"tokens_per_second": rates}


def trained_line(job: Job, run: Path) -> list:
    """Returns the frontier of the run's exits on its survey; see `frontier_line`."""
    arrays = load_file(run / "calibration" / "survey.safetensors")
    return frontier_line(certify.Survey(**{**arrays, "full_cost": float(arrays["full_cost"])}), job)


def raw_line(job: Job, ids: list[list[int]]) -> list:
    """Returns the frontier of untrained exits at the same depths: final norm, LM head, largest probability as score."""
    model, exits = job.model, job.model.exits
    shortlists = [None if depth < model.view.num_layers else len(exits.shortlist(index))
                  for index, depth in enumerate(model.depths)]  # fmt: skip
    raw = EarlyExitModel.from_backbone(model.backbone, ExitConfig(
        depths=list(model.depths), head="norm", gate="max_prob", shortlist=shortlists, blocks=model.exit_config.blocks))
    for index in [index for index, size in enumerate(shortlists) if size]:
        setattr(raw.exits, f"shortlist_{index}", exits.shortlist(index))
    return frontier_line(certify.survey(raw, ids, job.max_new_tokens, job.batch_size), job, raw)


def frontier_line(found: certify.Survey, job: Job, model: EarlyExitModel | None = None) -> list:
    """Returns undominated [relative FLOPs, harm per token], cheapest first, full depth the last.

    The survey asks every gate; here an exit that is never taken is not asked, and costs nothing.
    """
    costs, harms, ladder = (model or job.model).costs, found.harms(job.harm, job.tolerance), []
    while not ladder or ladder[-1] < found.costs[:, -1].max():
        ladder.append(costs.by_exit(len(ladder) + 1)[-1])
    contexts, count = 1 + np.searchsorted(ladder, found.costs[:, -1]), harms.shape[1]
    priced, points = {}, [(1.0, 0.0)]
    for exits in [list(range(count))] + [[index] for index in range(count) if count > 1]:
        arrays = found.scores[:, exits], harms[:, exits], found.costs[:, [*exits, count]]
        for point in ranking.frontier(*arrays, found.full_cost, found.rows):
            thresholds = np.full(count, np.inf)
            thresholds[exits] = point.thresholds
            asked = tuple(thresholds < np.inf)
            if asked not in priced:
                table = {context: costs.by_exit(context, asked) for context in np.unique(contexts)}
                priced[asked] = np.stack([table[context] for context in contexts])
            harm, cost = ranking.predicted(thresholds, found.scores, harms, priced[asked], found.rows)
            points.append((cost / found.full_cost, float(harm.mean())))
    points = sorted(points)
    return [list(p) for i, p in enumerate(points) if all(p[1] < cheaper[1] - 1e-12 for cheaper in points[:i])]
