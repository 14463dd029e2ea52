"""Results of any number of models and policies as the rows of one table. Plain Python: reads JSON, needs no torch.

Read are the files that `eval/harness.py` writes, lm-eval's own `results_TIME.json` and beside it `adaptive_TIME.json`,
and results of lm-eval's other models, which have no trace: they count as full depth.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

# What stands for a task, the first one that it has; else its first metric.
METRICS = ("exact_match", "acc_norm", "acc", "word_perplexity", "perplexity", "bits_per_byte")


def read(places: Sequence[str | Path]) -> tuple[list[dict], list[str]]:
    """Returns the rows found in files and folders, and a line for each file that could not be used.

    Of the same model, policy and tasks the newest is kept. Each row has `model`, `backbone`, `policy`, `full` (whether
    it is full depth), `tasks` (by name: `metric`, `value`, `stderr`, `higher_is_better`), `statistics`
    (`Tally.summary` of "all" and by task), `oracle_share`, `average`, `dominated` and where it comes from. A score that
    is NaN or infinite cannot be averaged or drawn: the row has no such task, and a line says so.

    Raises:
        ValueError: nothing there that could be used.
    """
    files, problems, found = [], [], {}
    for place in map(Path, places):
        if place.is_dir():
            files += sorted([*place.rglob("adaptive_*.json"), *place.rglob("results_*.json")])
        elif place.exists():
            files.append(place)
        else:
            problems.append(f"{place}: there is no such file or folder")
    for path in dict.fromkeys(files):
        try:
            row = _row(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            problems.append(f"{path}: {what}")
            continue
        if row is not None:
            lost = row.pop("lost")
            problems += [f"{path}: {task} has {what}, so the row goes without it" for task, what in lost.items()]
            key = (row["model"], row["policy"], *sorted(row["tasks"] | lost))
            if key not in found or found[key]["date"] <= row["date"]:
                found[key] = row
    if not found:
        raise ValueError("; ".join([*problems, f"no results in {[str(place) for place in places]}"]))
    rows = list(found.values())
    _compare(rows)
    return sorted(rows, key=lambda row: (row["backbone"], row["model"], _cost(row), row["policy"])), problems


def _load(path: Path) -> dict:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _row(path: Path) -> dict | None:
    """Returns the row of a file; None of a file that is read together with another."""
    side = path.with_name(path.name.replace("results_", "adaptive_", 1))
    if path.name.startswith("results_") and side.exists():
        return None
    own, found = _load(path.with_name(path.name.replace("adaptive_", "results_", 1))), {}
    given = own["config"].get("model_args")
    given = given if isinstance(given, dict) else {}
    if path.name.startswith("adaptive_"):
        found = _load(path)
    elif "policy" in given or own["config"].get("model") == "adaptive":
        raise ValueError(f"{side.name}, the other half of it, is missing")
    model = found.get("model") or given.get("pretrained") or own.get("model_name") or own["config"]["model"]
    where = found.get("provenance", {})
    thresholds = found["thresholds"] if found else []
    statistics = found["statistics"] if found else {"all": {}, "tasks": {}}
    priced = {**statistics["tasks"], "all": statistics["all"]}
    tasks, lost = _tasks(own)
    row = {
        "model": str(model),
        "backbone": str(found.get("backbone") or model),
        "policy": found["policy"] if found else str(own["config"]["model"]),
        "full": all(threshold is None for threshold in thresholds),
        "thresholds": thresholds,
        "exits": found["exits"] if found else None,
        "layers": found["layers"] if found else None,
        "certificate": found.get("certificate"),
        "tasks": tasks,
        "lost": lost,
        "documents": {task: counts["effective"] for task, counts in own.get("n-samples", {}).items()},
        "data": {task: config.get("dataset_path") for task, config in own.get("configs", {}).items()},
        "statistics": statistics,
        "oracle_share": {name: _share(part) for name, part in priced.items()},
        "examples": found.get("examples", {}),
        "command": where.get("command"),
        "commit": where.get("commit") or own.get("git_hash"),
        "machine": where.get("machine"),
        "versions": where.get("versions") or {"lm_eval": own.get("lm_eval_version")},
        "date": where.get("date") or _iso(own.get("date")),
        "files": [str(path)],
    }  # fmt: skip
    if odd := [name for name, value in row.items() if not _finite(value)]:
        raise ValueError(f"NaN or infinite figures in {odd}; evaluate this policy again")
    return row


def _finite(value: object) -> bool:
    """Returns whether all numbers in a JSON value are such that JSON has them."""
    if isinstance(value, float):
        return math.isfinite(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(map(_finite, parts))


def _tasks(own: dict) -> tuple[dict[str, dict], dict[str, str]]:
    """Returns the scores by task, and of tasks whose score is not finite what they have instead."""
    out, lost = {}, {}
    for task, values in own["results"].items():
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and "," in name}
        named = {name.split(",")[0]: name for name in reversed(numbers) if "_stderr," not in name}
        if not named:
            continue  # a group's heading
        metric = next((metric for metric in METRICS if metric in named), next(reversed(named)))
        name = named[metric]
        if not math.isfinite(numbers[name]):
            lost[task] = f"{metric} {numbers[name]}"
            continue
        error = values.get(f"{metric}_stderr,{name.split(',', 1)[1]}")
        better = own.get("higher_is_better", {}).get(task, {}).get(metric)
        out[task] = {
            "metric": metric,
            "value": numbers[name],
            "stderr": error if isinstance(error, (int, float)) and math.isfinite(error) else None,
            "higher_is_better": "perplexity" not in metric and metric != "bits_per_byte" if better is None else better,
        }
    if not out:
        raise ValueError(f"it has no finite figures of any task{f', only {lost}' if lost else ''}")
    return out, lost


def _share(statistics: dict) -> float | None:
    """Returns the saving as a share of the oracle's; None where there is none to compare with."""
    oracle = statistics.get("oracle") or {}
    most = 1 - oracle.get("relative_flops", 1.0)
    return None if most <= 0 else (1 - statistics["relative_flops"]) / most


def _cost(row: dict) -> float:
    return row["statistics"]["all"].get("relative_flops", 1.0)


def _compare(rows: list[dict]) -> None:
    """Writes `average` and `dominated` into the rows: both against rows of the same backbone and tasks."""
    for row in rows:
        peers = [other for other in rows if _comparable(row, other)]
        full = next((other for other in peers if other["model"] == row["model"] and other["full"]), None)
        full = full or next((other for other in peers if other["full"]), None)
        row["average"] = None if full is None else _average(row, full)
    for row in rows:
        here, row["dominated"] = _point(row), None
        for other in rows:
            there = _point(other)
            if here and there and other is not row and _comparable(row, other):
                no_worse = there[0] <= here[0] and there[1] >= here[1]
                if no_worse and there != here:
                    row["dominated"] = f"{other['model']} {other['policy']}"


def _iso(seconds: float | None) -> str:
    """Returns a point in time as lm-eval writes it, since 1970, in ISO 8601."""
    return "" if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _comparable(row: dict, other: dict) -> bool:
    same = row["tasks"].keys() == other["tasks"].keys() and row["documents"] == other["documents"]
    return same and row["backbone"] == other["backbone"]


def _point(row: dict) -> tuple[float, float] | None:
    return row["average"] and (_cost(row), row["average"]["value"])


def _average(row: dict, full: dict) -> dict | None:
    """Returns the quality kept: the mean over tasks of the score relative to full depth (inverted where lower is
    better), and its standard error from those of the row, taken as independent; those of full depth are left out,
    since both saw the same documents. A task is `left_out` on which full depth itself is no better than 0 by two
    standard errors: nothing is there to be kept, and a ratio would be of noise. None if no task remains."""
    kept, variance, left_out = [], 0.0, []
    for task, ours in row["tasks"].items():
        theirs, value, error = full["tasks"][task], ours["value"], ours["stderr"] or 0.0
        if not ours["higher_is_better"]:
            ratio = theirs["value"] / value if value else 1.0
            error *= abs(ratio / value) if value else 1.0
        elif theirs["value"] <= 2 * (theirs["stderr"] or 0.0):
            left_out.append(task)
            continue
        else:
            ratio, error = value / theirs["value"], error / theirs["value"]
        kept.append(ratio)
        variance += error**2
    if not kept:
        return None
    return {"value": sum(kept) / len(kept), "stderr": math.sqrt(variance) / len(kept), "left_out": left_out}
