"""A leaderboard out of result files: quality against cost, of any number of models and policies.

    python eval/leaderboard.py --results runs/demo/scores runs/other/scores --output results/leaderboard
    python eval/leaderboard.py --config configs/leaderboard.yaml

Results are what eval/harness.py writes, and lm-eval's own files of plain models. In OUTPUT:

    leaderboard.html   one page that needs no network: sortable table, frontiers, histograms, an answer by depth
    leaderboard.md, .json, .csv
    hub/MODEL/         .eval_results/*.yaml, model-index.yaml and card.md, for the model's repository
"""

import sys
from dataclasses import dataclass
from typing import Literal

from adaptive.checked import Checked, load_config


@dataclass
class LeaderboardConfig(Checked):
    """What to show, and where.

    Attributes:
        results: result files, or folders of them
        output: folder for the leaderboard
        log: tracker that gets the table, the frontier and the histograms (wandb; its offline mode works); none = off
        project: of the tracker
    """

    results: list[str]
    output: str
    log: Literal["wandb"] | None = None
    project: str = "adaptive"

    def problems(self) -> list[str]:
        """One line for each fault."""
        return [] if self.results else ["`results` is empty; name at least one file or folder"]


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(LeaderboardConfig)

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from adaptive import board
from adaptive.runs import put, write_json

TEMPLATE = Path(__file__).with_suffix(".html")


def main(config: LeaderboardConfig) -> list[dict]:
    """Writes the leaderboard; returns its rows."""
    rows, problems = board.read(config.results)
    for line in problems:
        print(f"skipped: {line}", file=sys.stderr)
    folder = Path(config.output)
    document = {"command": " ".join(sys.argv), "skipped": problems, "rows": rows}
    write_json(folder / "leaderboard.json", document)
    write(folder / "leaderboard.html", page(rows, problems))
    write(folder / "leaderboard.md", markdown(rows, problems))
    write(folder / "leaderboard.csv", comma_separated(rows))
    for model in dict.fromkeys(row["model"] for row in rows):
        for_the_hub([row for row in rows if row["model"] == model], folder / "hub" / file_name(model))
    if config.log == "wandb":
        track(rows, config.project, folder / "leaderboard.html")
    print(f"{markdown(rows, [])}\n{len(rows)} rows, {len(problems)} skipped; open {folder / 'leaderboard.html'}")
    return rows


def write(path: Path, text: str) -> None:
    """Writes a text file in one move."""
    put(path, lambda fresh: fresh.write_text(text, encoding="utf-8", newline=""))


def file_name(name: str) -> str:
    """Returns what a model or policy is called in a path."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-.") or "model"


def task_names(rows: list[dict]) -> list[str]:
    """Returns all tasks, in order of appearance."""
    return list(dict.fromkeys(task for row in rows for task in row["tasks"]))


def metric_names(rows: list[dict]) -> dict[str, str]:
    """Returns the metric by task."""
    return {task: row["tasks"][task]["metric"] for row in reversed(rows) for task in row["tasks"]}


def left_out(rows: list[dict]) -> str:
    """Returns a sentence about tasks that the average does not have; empty if there are none."""
    tasks = sorted({task for row in rows for task in (row["average"] or {}).get("left_out", [])})
    return f"Not in quality kept, as full depth is no better than 0 there: {', '.join(tasks)}." if tasks else ""


def page(rows: list[dict], problems: list[str]) -> str:
    """Returns the whole page as HTML."""
    machines = {json.dumps(row["machine"]) for row in rows if row["machine"]}
    where = "one machine" if len(machines) == 1 else f"{len(machines)} machines: compare tokens/s within one only"
    about = (
        f"{len(rows)} rows, {len(task_names(rows))} tasks. Every score went through the exits: log-likelihoods come "
        f"from the exit that each token leaves at, texts from the decoding loop. Timed on {where}. {left_out(rows)}"
    )
    data = {
        "rows": rows,
        "problems": problems,
        "about": about,
        "tasks": task_names(rows),
        "metrics": metric_names(rows),
    }
    # Inside a script element only "</" could end it.
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\!--")
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA</script>", text + "</script>", 1)


def columns(rows: list[dict]) -> dict[str, Callable[[dict], object]]:
    """Returns by heading what a row has in that column."""
    found: dict[str, Callable] = {"model": lambda row: row["model"], "policy": lambda row: row["policy"]}
    found["quality kept"] = lambda row: row["average"] and row["average"]["value"]
    found["quality kept, s.e."] = lambda row: row["average"] and row["average"]["stderr"]
    for task, metric in metric_names(rows).items():
        found[f"{task} {metric}"] = lambda row, task=task: row["tasks"].get(task, {}).get("value")
        found[f"{task} {metric}, s.e."] = lambda row, task=task: row["tasks"].get(task, {}).get("stderr")
    for name in ("relative_flops", "relative_bytes", "mean_depth", "tokens_per_second", "unlisted"):
        found[name.replace("_", " ")] = lambda row, name=name: row["statistics"]["all"].get(name)
    found["share of the oracle's saving"] = lambda row: row["oracle_share"]["all"]
    found["certified harm"] = lambda row: row["certificate"] and row["certificate"]["certified"]
    found["exits"] = lambda row: row["exits"] and " ".join(map(str, row["exits"]["depths"]))
    found["dominated by"] = lambda row: row["dominated"]
    for name in ("commit", "date", "command"):
        found[name] = lambda row, name=name: row[name]
    found["machine"] = lambda row: row["machine"] and ", ".join(f"{k} {v}" for k, v in row["machine"].items())
    return found


def comma_separated(rows: list[dict]) -> str:
    """Returns the table as CSV, figures in full."""
    out, found = io.StringIO(), columns(rows)
    writer = csv.writer(out)
    writer.writerow(found)
    writer.writerows([["" if (v := value(row)) is None else v for value in found.values()] for row in rows])
    return out.getvalue()


def markdown(rows: list[dict], problems: list[str]) -> str:
    """Returns the table in short as Markdown; a dominated row is marked."""
    metrics = metric_names(rows)
    names = ["model", "policy", "quality kept", *(f"{task}<br>{metric}" for task, metric in metrics.items())]
    names += ["FLOPs", "bytes", "oracle's share", "mean depth", "tokens/s", "certified harm"]
    lines = [names, ["---", "---", *["---:"] * (len(names) - 2)]]
    for row in rows:
        found, average, share = row["statistics"]["all"], row["average"], row["oracle_share"]["all"]
        cells = [row["model"], f"{row['policy']}{' ▽' if row['dominated'] else ''}"]
        cells.append(f"{average['value']:.1%} ± {average['stderr']:.1%}" if average else "-")
        for task in metrics:
            score = row["tasks"].get(task)
            error = f" ± {score['stderr']:.3f}" if score and score["stderr"] else ""
            cells.append(f"{score['value']:.3f}{error}" if score else "-")
        for name, form in (("relative_flops", ".3f"), ("relative_bytes", ".3f")):
            cells.append(f"{found.get(name, 1.0):{form}}")
        cells.append("-" if share is None else f"{share:.0%}")
        for name in ("mean_depth", "tokens_per_second"):
            cells.append(f"{found[name]:.1f}" if found.get(name) else "-")
        cells.append(f"<= {row['certificate']['certified']:.4f}" if row["certificate"] else "-")
        lines.append([cell.replace("|", "\\|") for cell in cells])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text += "\n\n▽ dominated: another row of this backbone costs no more and keeps no less. ± standard error.\n"
    text += f"{left_out(rows)}\n" if left_out(rows) else ""
    return text + "".join(f"\nSkipped: {line}\n" for line in problems)


def for_the_hub(rows: list[dict], folder: Path) -> None:
    """Writes what a model's repository can take: results as the Hub reads them, and a section for the card. Data sets
    that are local files go into the card only."""
    index = []
    for row in rows:
        found, entries = row["statistics"]["all"], []
        notes = None
        if "mean_depth" in found:
            notes = f"early exit, policy {row['policy']}, mean depth {found['mean_depth']:.2f} of {row['layers']}, "
            notes += f"relative FLOPs {found['relative_flops']:.3f}"
        for task, score in row["tasks"].items():
            data = row["data"].get(task) or task
            if "/" in data:
                entry = EvalResultEntry(data, task, round(score["value"], 6), date=row["date"] or None, notes=notes)
                entries.append(entry)
            result = EvalResult("text-generation", data, task, score["metric"], round(score["value"], 6))
            result.metric_name, result.metric_args = f"{score['metric']} ({row['policy']})", {"policy": row["policy"]}
            index.append(result)
        if entries:
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            write(folder / ".eval_results" / f"{file_name(row['policy'])}.yaml", text)
    named = {"model-index": eval_results_to_model_index(Path(rows[0]["model"]).name, index)}
    write(folder / "model-index.yaml", yaml.safe_dump(named, sort_keys=False))
    write(folder / "card.md", f"## Evaluation\n\nEvery score went through the exits.\n\n{markdown(rows, [])}")


def track(rows: list[dict], project: str, html: Path) -> None:
    """Logs the table, the frontier, the histograms and the page to Weights & Biases."""
    import wandb

    found = columns(rows)
    with wandb.init(project=project, job_type="leaderboard") as run:
        table = wandb.Table(columns=list(found), data=[[value(row) for value in found.values()] for row in rows])
        depths = [
            [row["model"], row["policy"], depth, share]
            for row in rows
            for depth, share in row["statistics"]["all"].get("histogram", [])
        ]
        histograms = wandb.Table(columns=["model", "policy", "depth", "share"], data=depths)
        frontier = wandb.plot.scatter(table, "relative flops", "quality kept", title="quality kept against FLOPs")
        run.log({"leaderboard": table, "frontier": frontier, "depths": histograms})
        run.log({"page": wandb.Html(html.read_text(encoding="utf-8"), inject=False)})


if __name__ == "__main__":
    main(CONFIG)
