"""The leaderboard: figures as in the files, what is broken is named and skipped, a page that needs nobody else."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import script

from adaptive import board

ROOT = Path(__file__).parents[1]
TASKS = [f"task{n}" for n in range(8)]


def results(folder, model, policy, flops, quality, tasks=TASKS, when=0, full=False):
    """Writes both files of one policy, as eval/harness.py does; returns the side file."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = f"2026-11-22T20-00-{len(list(folder.iterdir())):06d}"
    own = {"results": {}, "higher_is_better": {}, "configs": {}, "n-samples": {}, "git_hash": "abc", "date": 1.0 + when,
           "config": {"model": model, "model_args": {"pretrained": model, "policy": policy}}}  # fmt: skip
    for number, task in enumerate(tasks):
        lower = number % 4 == 3
        name, value = ("perplexity", 10 / quality) if lower else ("acc", 0.8 * quality)
        error = 0.5 if lower else 0.04
        own["results"][task] = {"alias": task, f"{name},none": value, f"{name}_stderr,none": error}
        own["higher_is_better"][task] = {name: not lower}
        own["configs"][task] = {"dataset_path": f"org/{task}" if number else "json"}
        own["n-samples"][task] = {"original": 100, "effective": 50}
    part = {"tokens": 100, "mean_depth": 30 * flops, "relative_flops": flops, "relative_bytes": flops, "unlisted": 0.0,
            "histogram": [[10, 0.0 if full else 0.5], [20, 0.0 if full else 0.25], [30, 1.0 if full else 0.25]],
            "tokens_per_second": 20 / flops, "oracle": {"relative_flops": 0.5}}  # fmt: skip
    side = {
        "policy": policy, "model": model, "backbone": "tiny", "exits": {"depths": [10, 20]}, "layers": 30,
        "thresholds": [None, None] if full else [0.5, 0.5],
        "certificate": None if full else {"certified": 0.04, "harm": "regret", "delta": 0.05, "epsilon": 0.05,
                                          "kind": "risk", "n": 100, "bound": "wsr"},
        "statistics": {"all": part, "tasks": {task: part for task in tasks}},
        "examples": {tasks[0]: {"prompt": "Why </script><b>?",
                                "tokens": [["Be", 10, True], ["cause", 30, False], [" <i>", 20, True]]}},
        "provenance": {"command": "harness.py", "commit": "c0ffee", "date": f"2026-11-22T20:0{when}:00Z",
                       "machine": {"cpu": "AMD", "cores": 2}, "versions": {"torch": "2.13"}},
    }  # fmt: skip
    (folder / f"results_{stamp}.json").write_text(json.dumps(own))
    (folder / f"adaptive_{stamp}.json").write_text(json.dumps(side))
    return folder / f"adaptive_{stamp}.json"


@pytest.fixture
def place(tmp_path):
    """Results of one model under four policies, one of them dominated, and of a plain model."""
    for policy, flops, quality in (("full", 1.0, 1.0), ("a", 0.8, 0.95), ("worse", 0.9, 0.9), ("b", 0.6, 0.5)):
        results(tmp_path / "scores", "runs/tiny", policy, flops, quality, full=policy == "full")
    return tmp_path / "scores"


def command(*flags, **environment):
    words = [sys.executable, str(ROOT / "eval" / "leaderboard.py"), *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)


def test_rows_are_the_files_figures(place):
    rows, problems = board.read([place])
    assert not problems and [row["policy"] for row in rows] == ["b", "a", "worse", "full"]
    b, a, worse, full = rows
    assert a["tasks"]["task0"] == {"metric": "acc", "value": 0.8 * 0.95, "stderr": 0.04, "higher_is_better": True}
    assert a["average"]["value"] == pytest.approx(0.95)  # perplexity is inverted
    # 6 accuracies with an error of 0.04 / 0.8, 2 perplexities of 10 / 0.95 with 0.5.
    expected = (6 * 0.05**2 + 2 * (10 * 0.5 / (10 / 0.95) ** 2) ** 2) ** 0.5 / 8
    assert a["average"]["stderr"] == pytest.approx(expected)
    assert worse["dominated"] == "runs/tiny a" and not (a["dominated"] or b["dominated"] or full["dominated"])
    assert a["oracle_share"]["all"] == pytest.approx(0.2 / 0.5)
    assert full["full"] and full["oracle_share"]["all"] == 0


def test_a_task_that_full_depth_cannot_do_is_left_out_of_the_average(place, tmp_path):
    for path in place.glob("results_*.json"):
        own = json.loads(path.read_text())
        own["results"]["task0"] = {"acc,none": 0.02 if "full" in path.read_text() else 0.04, "acc_stderr,none": 0.02}
        path.write_text(json.dumps(own))
    rows, _ = board.read([place])
    a = next(row for row in rows if row["policy"] == "a")
    assert a["average"]["value"] == pytest.approx(0.95) and a["average"]["left_out"] == ["task0"]
    command("--results", place, "--output", tmp_path / "out")
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "full depth is no better than 0 there: task0." in text and "0.040 ± 0.020" in text
    assert "there: task0." in (tmp_path / "out" / "leaderboard.html").read_text()


def test_what_is_broken_is_named_and_skipped_and_the_rest_is_drawn(place, tmp_path):
    half = results(place, "runs/tiny", "c", 0.7, 0.7)
    half.write_text(half.read_text()[:200])
    alone = results(place, "runs/tiny", "d", 0.7, 0.7)
    alone.unlink()
    lost = results(place, "runs/tiny", "e", 0.7, 0.7)
    lost.with_name(lost.name.replace("adaptive", "results")).unlink()
    odd = results(place, "runs/tiny", "f", 0.7, 0.7)
    odd.write_text('{"policy": "f"}')
    binary = place / "adaptive_x.json"
    binary.write_bytes(b"\xff\xfe\x00")
    done = command("--results", place, tmp_path / "nowhere", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    broken = [half, alone.with_name(alone.name.replace("adaptive", "results")), lost, odd, binary, tmp_path / "nowhere"]
    for path in broken:
        assert f"skipped: {path}: " in done.stderr, path
    shown = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert [row["policy"] for row in shown["rows"]] == ["b", "a", "worse", "full"] and len(shown["skipped"]) == 6
    assert str(half) in (tmp_path / "out" / "leaderboard.html").read_text()
    nothing = command("--results", tmp_path / "nowhere", "--output", tmp_path / "other")
    assert nothing.returncode != 0 and "no results in" in nothing.stderr


def test_the_newest_of_a_kind_counts_and_a_plain_model_has_a_row(place):
    results(place, "runs/tiny", "a", 0.75, 0.96, when=5)
    plain = json.loads(next(place.glob("results_*.json")).read_text())
    plain["config"] = {"model": "hf", "model_args": {"pretrained": "tiny"}}
    (place / "results_plain.json").write_text(json.dumps(plain))
    rows, problems = board.read([place])
    assert not problems and len(rows) == 5
    assert next(row for row in rows if row["policy"] == "a")["statistics"]["all"]["relative_flops"] == 0.75
    hf = next(row for row in rows if row["policy"] == "hf")
    assert hf["full"] and hf["average"]["value"] == 1 and hf["backbone"] == "tiny"


def test_every_form_says_the_same_and_the_page_is_self_contained(place, tmp_path):
    out = tmp_path / "out"
    done = command("--results", place, "--output", out, "--log", "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    table = list(csv.DictReader(io.StringIO((out / "leaderboard.csv").read_text())))
    assert [line["policy"] for line in table] == ["b", "a", "worse", "full"]
    assert float(table[1]["task0 acc"]) == 0.8 * 0.95 and table[2]["dominated by"] == "runs/tiny a"
    text = (out / "leaderboard.md").read_text()
    assert "| worse ▽ |" in text and "95.0% ±" in text and "40%" in text
    page = (out / "leaderboard.html").read_text()
    assert page.count("</script>") == 2 and "<b>?" in page and "https://" not in page and "src=" not in page
    assert page.count("http://") == page.count("http://www.w3.org/2000/svg") == 1
    hub = out / "hub" / "runs-tiny"
    entries = yaml.safe_load((hub / ".eval_results" / "a.yaml").read_text())
    assert len(entries) == 7 and entries[0]["dataset"] == {"id": "org/task1", "task_id": "task1"}
    assert "mean depth 24.00 of 30" in entries[0]["notes"]
    index = yaml.safe_load((hub / "model-index.yaml").read_text())["model-index"]
    assert index[0]["name"] == "tiny" and len(index[0]["results"]) == 8
    assert (hub / "card.md").read_text().startswith("## Evaluation")


def test_figures_that_are_not_finite_are_named_and_the_page_is_drawn(place, tmp_path):
    before = {row["policy"]: row for row in board.read([place])[0]}
    odd = results(place, "runs/tiny", "b", 0.6, 0.5, when=5)  # the newest one of b counts, odd as it is
    whole = odd.with_name(odd.name.replace("adaptive", "results"))
    whole.write_text(whole.read_text().replace('"perplexity,none": 20.0', '"perplexity,none": Infinity', 1))
    half = results(place, "runs/tiny", "c", 0.7, 0.7)
    half.write_text(half.read_text().replace('"relative_flops": 0.7', '"relative_flops": NaN'))
    leaderboard = script("eval/leaderboard")
    rows = leaderboard.main(leaderboard.LeaderboardConfig([str(place)], str(tmp_path / "out")))
    b, a, worse, full = rows
    assert set(b["tasks"]) == set(TASKS) - {"task3"} and b["average"] is None
    assert (a, worse, full) == (before["a"], before["worse"], before["full"])
    shown = json.loads((tmp_path / "out" / "leaderboard.json").read_text(), parse_constant=pytest.fail)
    assert shown["rows"] == json.loads(json.dumps(rows)) and len(shown["skipped"]) == 2
    assert f"{odd}: task3 has perplexity inf, so the row goes without it" in shown["skipped"]
    assert any(line.startswith(f"{half}: NaN or infinite figures in ['statistics'") for line in shown["skipped"])
    assert "task3 has perplexity inf" in (tmp_path / "out" / "leaderboard.html").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a headless browser")
def test_a_browser_draws_fifty_rows_of_eight_tasks_without_a_network(place, tmp_path):
    for number in range(46):
        results(place, f"runs/model{number % 5}", f"policy-{number}", 0.5 + number / 100, 0.4 + number / 90)
    command("--results", place, "--output", tmp_path)
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    browser += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*browser, (tmp_path / "leaderboard.html").as_uri()], capture_output=True, timeout=120)
    drawn = done.stdout.decode()
    assert drawn.count("<tr") == 51 and drawn.count("<circle") > 90 and drawn.count("<th ") == 17
    assert "polyline" in drawn and 'class="token"' in drawn and "Why &lt;/script&gt;" in drawn


def plain(place, config, **values):
    """Writes what lm-eval's own models leave behind."""
    own = json.loads(next(place.glob("results_2*.json")).read_text()) | {"config": config} | values
    (place / "results_plain.json").write_text(json.dumps(own))


def test_a_plain_model_says_nothing_of_exits_to_the_hub(place, tmp_path):
    plain(place, {"model": "hf", "model_args": {"pretrained": "tiny"}}, date=1764000000.1)
    leaderboard = script("eval/leaderboard")
    leaderboard.main(leaderboard.LeaderboardConfig([str(place)], str(tmp_path / "out")))
    entry = yaml.safe_load((tmp_path / "out/hub/tiny/.eval_results/hf.yaml").read_text())[0]
    assert entry["date"] == "2025-11-24T16:00:00Z" and "exit" not in entry.get("notes", "")


@pytest.mark.parametrize("given", [{"pretrained": "runs/tiny"}, "pretrained=runs/tiny,policy=certified"])
def test_exits_without_their_trace_are_no_full_depth(place, given):
    plain(place, {"model": "adaptive", "model_args": given}, model_name="runs/tiny")
    rows, problems = board.read([place])
    assert len(rows) == 4 and len(problems) == 1 and "the other half of it, is missing" in problems[0]


def test_rows_of_other_documents_are_not_compared(place):
    results(place, "runs/tiny", "few", 0.5, 1.1)
    path = sorted(place.glob("results_*.json"))[-1]
    path.write_text(path.read_text().replace('"effective": 50', '"effective": 5'))
    found = {row["policy"]: row for row in board.read([place])[0]}
    assert found["few"]["average"] is None and not found["a"]["dominated"]
