"""The report of a run: its figures are the trace's, nothing is measured twice, what it cannot vouch for is refused."""

import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LAYERS, VOCAB, script, tiny
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive import EarlyExitModel, ExitConfig, ExitPolicy, certify, outcomes, survey
from adaptive.calibration import rouge_l
from adaptive.prompts import encode

pytest.importorskip("matplotlib", reason="the report draws; it comes with the extra `demo`")
ROOT = Path(__file__).parent.parent
NEW = 12


@pytest.fixture(scope="module")
def report():
    """The script as a module."""
    return script("eval/report")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a tiny model, random exits, prompts, and certificates of two budgets."""
    place = tmp_path_factory.mktemp("report")
    backbone = tiny("llama")
    backbone.generation_config.eos_token_id = [5, 23, 41, 60]  # so that answers have different lengths
    backbone.save_pretrained(place / "model")
    tokenizer = Tokenizer(models.WordLevel({f"<w{n}>": n for n in range(VOCAB)}, unk_token="<w3>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<w2>").save_pretrained(place / "model")
    exits = ExitConfig(depths=[1, 3, LAYERS], rank=4, shortlist=[None, None, 40])
    model = EarlyExitModel.from_backbone(str(place / "model"), exits)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.exits.parameters():
        if parameter.dim() >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.exits.choose_shortlists(torch.rand(VOCAB, generator=generator))
    model.save_pretrained(place / "run")
    words = torch.randint(3, VOCAB, (60, 6), generator=generator).tolist()
    texts = [" ".join(f"<w{n}>" for n in line[: 2 + index % 4]) for index, line in enumerate(words)]
    parts = {"select": texts[:16], "certify": texts[16:48], "report": texts[48:]}
    (place / "prompts.json").write_text(json.dumps(parts))
    calibrate = script("train/calibrate")
    settings = {"risks": [], "budgets": [0.7, 0.95], "max_new_tokens": NEW}
    calibrate.main(calibrate.CalibrationConfig(str(place / "run"), str(place / "prompts.json"), **settings))
    return place / "run"


def configure(report, run: Path):
    return report.ReportConfig(str(run), str(run.parent / "prompts.json"), speed_prompts=2, speed_tokens=6)


@pytest.fixture(scope="module")
def made(report, run):
    """What report.json holds after the first call."""
    return report.main(configure(report, run))


@pytest.fixture
def copied(run, made, tmp_path):
    """The run and its prompts, to be changed; the report is in it."""
    shutil.copy(run.parent / "prompts.json", tmp_path)
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_figures_are_those_of_the_trace(made, run):
    model = EarlyExitModel.from_pretrained(run)
    texts = json.loads((run.parent / "prompts.json").read_text())["report"]
    ids = encode(texts, certify.load_tokenizer(model))
    assert [point["name"] for point in made["points"]] == ["full-depth", "budget-0.95", "budget-0.7"]
    said, _ = outcomes.answer(model, ids, ExitPolicy.full(3), NEW)
    assert len(set(map(len, said))) > 2, "answers of one length prove little"
    for point in made["points"]:
        thresholds = point["certificate"]["thresholds"] if point["certificate"] else [None] * 3
        answers, trace = outcomes.answer(model, ids, ExitPolicy(tuple(thresholds)), NEW)
        price = model.costs.price(trace)
        assert point["relative_flops"] == price.relative_flops and point["saved"] == price.saved
        assert point["mean_depth"] == trace.mean_depth and point["shares"] == trace.shares
        regret, nll = outcomes.judge(model, ids, answers)
        assert point["harm"] == pytest.approx(
            np.nanmean(np.where(np.isnan(regret), np.nan, regret > 0.25), axis=1).mean()
        )
        assert point["perplexity"] == pytest.approx(np.exp(np.nanmean(nll)))
        same = [rouge_l(ours, full) for ours, full in zip(answers, said, strict=True)]
        assert point["rouge_l"] == pytest.approx(np.mean(same))
        assert len(point["tokens_per_second"]) == 2 and min(point["tokens_per_second"]) > 0
    full, *others = made["points"]
    assert (full["harm"], full["relative_flops"], full["rouge_l"], full["relative_perplexity"]) == (0, 1, 1, 1)
    assert full["relative_speed"] == [1, 1, 1] and full["mean_depth"] == LAYERS and full["certificate"] is None
    assert all(point["harm"] > 0 and point["relative_flops"] < 1 and point["shares"][-1] < 1 for point in others)


def test_files_say_the_same(made, run):
    folder = run / "report"
    assert json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail) == json.loads(json.dumps(made))
    text = (folder / "report.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(made["points"]) and len({len(row) for row in rows}) == 1
    for row, point in zip(rows[2:], made["points"], strict=True):
        assert row[0] == f"| {point['name']}" and f"{point['relative_flops']:.3f}" in row
        assert f"{point['harm']:.4f} ± {point['standard_error']:.4f}" in row
        if point["certificate"]:
            assert f"<= {point['certificate']['certified']:.4f}" in row
    assert f"each of {made['prompts']} held-out" in text and "strictly disagrees" in text and "1 of" in text
    assert {"command", "commit", "date", "model", "exits", "machine", "versions", "prompts_digest"} <= set(made)
    picture = (folder / "frontier.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and int.from_bytes(picture[16:20], "big") >= 1000


def test_lines_are_undominated_and_reach_full_depth(made):
    for line in made["lines"].values():
        costs, harms = np.transpose(line)
        assert (np.diff(costs) > 0).all() and (np.diff(harms) < 0).all()
        assert harms[-1] == 0 and costs[-1] <= 1 and harms.max() <= 1 and len(line) > 3


def test_closed_exits_cost_nothing_in_the_lines(report, run):
    """The cheapest line point of a model whose gates are worthless at all exits but one: that exit's alone."""
    model = EarlyExitModel.from_pretrained(run)
    contexts = np.repeat([3, 7], 4)
    costs = np.stack([model.costs.by_exit(context) for context in contexts])
    full = np.mean([model.costs.by_exit(context, [False] * 3)[-1] for context in contexts])
    regret = np.tile([9.0, 0.0, 9.0], (8, 1))
    none = np.zeros((4, 0), int)
    found = survey.Survey(np.random.default_rng(0).random((8, 3)), regret, costs, full, np.arange(8) // 2, none, none)
    alone = np.mean([model.costs.by_exit(context, [False, True, False])[1] for context in contexts]) / full
    line = report.frontier_line(found, model, {"harm": "regret", "tolerance": 0.25})
    assert line[-1] == [pytest.approx(alone, abs=1e-12), 0.0]


def test_nothing_is_measured_twice(report, copied, made, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    observe, counted = outcomes.observe, []
    for place, name in ((outcomes, "observe"), (survey, "survey"), (EarlyExitModel, "generate")):
        monkeypatch.setattr(place, name, refuse)
    again = report.main(configure(report, copied))
    assert {**again, "date": "", "command": ""} == {**made, "date": "", "command": ""}
    # An interrupted run lacks some parts: those are made, and only those.
    monkeypatch.undo()
    monkeypatch.setattr(outcomes, "observe", lambda *args: counted.append(args[2]) or observe(*args))
    monkeypatch.setattr(survey, "survey", refuse)
    (copied / "report" / "parts" / "budget-0.7.json").unlink()
    again = report.main(configure(report, copied))
    assert again["points"] == made["points"] and len(counted) == 1
    assert list(counted[0].thresholds) == made["points"][2]["certificate"]["thresholds"]
    # Other prompts are another report.
    prompts = json.loads((copied.parent / "prompts.json").read_text())
    (copied.parent / "prompts.json").write_text(json.dumps(prompts | {"report": prompts["report"][:-1]}))
    with pytest.raises(AssertionError, match="measured again"):
        report.main(configure(report, copied))
    assert len(counted) == 4


def test_answer_is_shown_token_by_token(report, made, run):
    shown = made["shown"]
    early = shown["answers"]["budget-0.7"]
    assert shown["marks"] == ["1", "3", f"{LAYERS}, shortlist", f"{LAYERS}"]
    assert {exit for _, exit in shown["answers"]["full-depth"]} == {3} and min(exit for _, exit in early) < 3
    page = (run / "report" / "answer.html").read_text()
    assert "color-scheme:light dark" in page and not re.search(r"https?:|src=|<script|@import", page)
    place = page.index("<h2>full-depth")
    for tokens in shown["answers"].values():
        assert all(re.fullmatch(r" ?<w\d+>", piece) for piece, _ in tokens)
        for piece, exit in tokens:
            place = page.index(html.escape(piece.strip()), place) + 1
            opened = page.rindex("<span", 0, place)
            assert f'title="depth {shown["marks"][exit]}"' in page[opened:place]
            assert (report.COLOURS[exit % 6][1] in page[opened:place]) == (exit < 3)
    plain, coloured = (report.painted(shown, style) for style in ("plain", "ansi"))
    assert "\x1b" not in plain and f"[{LAYERS}]" in plain and f"[{shown['marks'][early[0][1]]}]{early[0][0]}" in plain
    piece, exit = next(token for token in early if token[1] < 3)
    assert f"\x1b[38;5;{report.COLOURS[exit][0]}m{piece}" in coloured
    text = "".join(piece for piece, _ in early)
    assert text in re.sub(r"\x1b\[[\d;]*m", "", coloured) and text in re.sub(r"\[[\w ,]+\](?!\n)", "", plain)


def test_terminal_gets_colours_unless_it_does_not_want_them(report, made, run, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for wanted in (True, False):
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setenv("NO_COLOR", "" if wanted else "1")
        report.main(configure(report, run))
        assert ("\x1b[38;5;" in sys.stdout.getvalue()) == wanted and "| full-depth |" in sys.stdout.getvalue()


def test_longest_answer_with_exits_is_chosen_and_characters_stay_whole(report):
    """Byte tokens; the cheaper budget is passed over for a risk, the longest answer for one that leaves early."""
    said = [list(b"long, but all of it at full depth"), list("für é…".encode()), list(b"ab")]
    taken = [[1] * len(said[0]), [0] + [1] * (len(said[1]) - 1), [0, 0]]
    decode = lambda ids: bytes(ids).decode("utf-8", errors="replace")  # noqa: E731
    point = {"answers": said, "taken": taken}
    points = {
        "full-depth": point,
        "risk-0.1": point | {"figures": {"shares": [0.1, 0.9], "relative_flops": 0.9}},
        "risk-0.01": point | {"figures": {"shares": [0, 1], "relative_flops": 1.0}},
        "budget-0.5": point | {"figures": {"shares": [0.9, 0.1], "relative_flops": 0.5}},
    }
    model = SimpleNamespace(view=SimpleNamespace(num_layers=4), num_exits=1, depths=(2,))
    names = [name for name in points if name != "full-depth"]
    job = SimpleNamespace(
        model=model, tokenizer=SimpleNamespace(decode=decode), certificates=names, prompts=[list(b"p")] * 3
    )
    shown = report.answer_shown(job, points)
    assert shown["index"] == 1 and list(shown["answers"]) == ["full-depth", "risk-0.1"]
    pieces = [piece for piece, _ in shown["answers"]["risk-0.1"]]
    assert pieces == ["f", "", "ü", "r", " ", "", "é", "", "", "…"]


def test_what_cannot_be_reported_on_is_refused(report, copied):
    certificate = copied / "calibration" / "budget-0.7.json"
    values = json.loads(certificate.read_text())
    certificate.write_text(json.dumps(values | {"model_digest": "another"}))
    with pytest.raises(
        ValueError, match="budget-0.7.json: certificate is for weights another.*train/calibrate.py again"
    ):
        report.main(configure(report, copied))
    prompts = json.loads((copied.parent / "prompts.json").read_text())
    (copied.parent / "prompts.json").write_text(json.dumps(prompts | {"report": prompts["certify"][:2]}))
    with pytest.raises(ValueError, match="has 2 prompts of `select` or `certify`; remove these"):
        report.main(configure(report, copied))
    (copied.parent / "prompts.json").write_text(json.dumps({"select": ["a"], "certify": ["b"]}))
    with pytest.raises(ValueError, match=r"lacks \['report'\]; it has \['certify', 'select'\]"):
        report.main(configure(report, copied))
    shutil.rmtree(copied / "calibration")
    with pytest.raises(ValueError, match="no certificates.*run train/calibrate.py first"):
        report.main(configure(report, copied))
    with pytest.raises(
        ValueError, match="`speed_tokens` is 1; it must be 2 or more(.|\n)*`prompts` is a.txt; give a .json"
    ):
        report.ReportConfig("run", "a.txt", speed_tokens=1)


def test_help_and_typos_answer_at_once():
    path = str(ROOT / "eval" / "report.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, path, "--help"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert shown.returncode == 0 and "--speed_tokens" in shown.stdout and "frontier.png" in shown.stdout
    checked = (
        f"import runpy, sys\nsys.argv = ['report.py', '--runn', 'x']\n"
        f"try:\n    runpy.run_path({path!r}, run_name='__main__')\n"
        "except ValueError as error:\n    print(error)\nprint('torch' in sys.modules)"
    )
    typo = subprocess.run([sys.executable, "-c", checked], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "did you mean `--run`" in typo.stdout and typo.stdout.endswith("False\n"), typo.stdout + typo.stderr


def test_a_kept_survey_is_the_survey(run):
    model, parts = EarlyExitModel.from_pretrained(str(run)), json.loads((run.parent / "prompts.json").read_text())
    fresh = survey.survey(model, encode(parts["select"], certify.load_tokenizer(model)), NEW)
    kept = load_file(run / "calibration" / "survey.safetensors")
    assert set(kept) == set(vars(fresh))
    for name, value in vars(fresh).items():
        assert np.array_equal(kept[name], value, equal_nan=True), name


def test_fills_are_compared_on_the_same_thresholds(run, tmp_path):
    fills, out = script("eval/fills"), tmp_path / "fills.json"
    settings = dict(prompts=str(run.parent / "prompts.json"), output=str(out), thresholds=[0.5, 0.5, 2.0])
    found = fills.main(fills.FillsConfig(run=str(run), max_new_tokens=NEW, batch_size=5, **settings))
    assert json.loads(out.read_text()) == json.loads(json.dumps(found)) and out.with_suffix(".png").exists()
    # Nothing was fitted in this run, so that both are the blocks' own projections.
    assert found["error"]["projected"] == found["error"]["fitted"]
    assert [len(values) for values in found["error"]["fitted"].values()] == [3, 1]
    first, later = found["error"]["fitted"]["3"][0], found["error"]["fitted"]["1"][1]
    assert first < 1e-6 < later, "the very next block reads the state"
    kinds = found["generation"]
    assert kinds["projected"] == kinds["fitted"]
    assert sum(kinds["recomputed"]["share_by_depth"].values()) == pytest.approx(1, abs=1e-3)


def test_a_recheck_tells_harm_and_likeness_on_new_prompts(run, tmp_path):
    recheck, calibrate = script("eval/recheck"), script("train/calibrate")
    words = [" ".join(f"<w{3 + (row + 7 * step) % 90}>" for step in range(4)) for row in range(90)]
    parts = {"select": words[:16], "certify": words[16:80], "report": words[76:]}
    (tmp_path / "prompts.json").write_text(json.dumps(parts))
    shutil.copytree(run, tmp_path / "run")
    settings = {"risks": [0.9], "delta": 0.3, "max_new_tokens": NEW}
    calibrate.main(calibrate.CalibrationConfig(str(tmp_path / "run"), str(tmp_path / "prompts.json"), **settings))
    paths = {name: str(tmp_path / "prompts.json") for name in ("prompts", "seen")}
    with pytest.raises(ValueError, match="no prompts"):  # "report" is among those seen
        recheck.main(recheck.RecheckConfig(str(tmp_path / "run"), **paths))
    paths.pop("seen")
    (tmp_path / "one.json").write_text(json.dumps({"report": parts["report"][:1]}))
    with pytest.raises(ValueError, match="has 1 prompts.*give at least 2"):
        recheck.main(recheck.RecheckConfig(str(tmp_path / "run"), str(tmp_path / "one.json")))
    config = recheck.RecheckConfig(str(tmp_path / "run"), **paths, output=str(tmp_path / "out.json"))
    found = recheck.main(config)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["prompts"] == 14 and found["mean_depth"] < LAYERS and 0 < found["harm"] <= found["certified"]
    assert 0 < found["rouge_l"] < 1 and found["relative_flops"] < 1
    assert found["relative_perplexity"] > 0.9 and {"commit", "command", "machine"} <= set(found)
