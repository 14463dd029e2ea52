"""Training through `train/exits.py`: it learns, moves only what it should, resumes, and agrees with itself."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import VOCAB, tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive import EarlyExitModel, ExitConfig, data, rows, runs
from adaptive.config import LossConfig, TrainConfig

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train" / "exits.py"
TOKENS = 16


@pytest.fixture(scope="module")
def exits():
    """The script as a module."""
    return conftest.script("train/exits")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and 40 rows of tokens, the first few of each row without labels."""
    folder = tmp_path_factory.mktemp("train")
    tiny("llama").save_pretrained(folder / "model")
    ids = torch.randint(3, VOCAB, (40, TOKENS), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    labels = ids.clone()
    for row in range(len(ids)):
        labels[row, : row % 7] = -100
    data.save_tokens(folder / "rows.safetensors", {"input_ids": ids, "labels": labels})
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state in singletons; and a GPU, if there is one, is not what is tested here."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def configure(place: Path, output: Path, **changes) -> TrainConfig:
    """A small run; `loss_*` changes go to the loss, `exits` replaces the exits."""
    loss = {name[5:]: changes.pop(name) for name in list(changes) if name.startswith("loss_")}
    settings = dict(
        model=str(place / "model"),
        data=[str(place / "rows.safetensors")],
        output=str(output),
        steps=8,
        batch_size=4,
        sequence_length=TOKENS,
        eval_every=4,
        learning_rate=3e-3,
        exits=ExitConfig(depths=[1, 3], rank=8),
    )
    return TrainConfig(**settings | changes, loss=LossConfig(**{"negatives": 32, "top_k": 8} | loss))


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def exit_drift(first: Path, second: Path) -> tuple[float, float]:
    """Largest and mean relative distance between the exits' losses of two runs, step by step and held out."""
    names = ["exit_1/loss", "exit_3/loss", "eval/exit_1/loss", "eval/exit_3/loss"]
    found = [
        abs(one[name] / other[name] - 1)
        for one, other in zip(lines(first), lines(second), strict=True)
        for name in names
        if name in one
    ]
    assert len(found) > len(names)
    return max(found), sum(found) / len(found)


def test_loss_falls_and_the_model_comes_back(exits, place, tmp_path):
    # Not linear heads: those start close to where they will be.
    config = configure(place, tmp_path / "run", steps=60, eval_every=30, exits=ExitConfig([1, 3], head="mlp"))
    summary = exits.main(config)
    history = lines(tmp_path / "run")
    assert [line["step"] for line in history] == list(range(1, 61))
    first, last = (sum(line["exit_3/loss"] for line in part) for part in (history[:10], history[50:]))
    assert last < 0.8 * first
    for depth in (1, 3):
        told = {f"eval/exit_{depth}/{what}" for what in ("loss", "agreement", "gate_loss", "gate_ece")}
        assert told <= set(history[59])
        assert {f"exit_{depth}/{what}" for what in ("no_harm", "auc", "ece")} <= set(summary["gates"])
    assert summary["eval"]["loss"] == history[59]["eval/loss"] and "expected_depth" in summary["eval"]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    model = EarlyExitModel.from_pretrained(tmp_path / "run")
    made = load_file(place / "rows.safetensors")
    out = model(made["input_ids"].long(), labels=made["labels"].long())
    assert out.metrics["exit_3/loss"] < 0.8 * first / 10
    early = EarlyExitModel.from_pretrained(tmp_path / "run" / "best")
    assert early.depths == (1, 3)
    made, own = (torch.cat([fill.weight.flatten() for fill in m.exits.fills]) for m in (model, early))
    assert not torch.allclose(made, own, atol=1e-3), "maps of K/V are fitted last"


def test_only_what_should_move_moves(exits, place, tmp_path):
    """Frozen: no bit of the backbone, every weight of exits and gates; in the end gates only."""
    run = exits.start(Accelerator(), configure(place, tmp_path, steps=3, loss_negatives=None))

    def weights():
        return {name: tensor.detach().clone() for name, tensor in run.plain.named_parameters()}

    def moved(before, after):
        return {name for name in before if not torch.equal(before[name], after[name])}

    start = weights()
    for step in range(3):
        exits.train_step(run, step)
    middle = weights()
    assert moved(start, middle) == {name for name in start if name.startswith("exits.")}
    run.progress["eval"] = {}
    exits.finish(run)
    assert moved(middle, weights()) == {name for name in start if name.startswith("exits.gates.")}
    for name, tensor in tiny("llama").named_parameters():
        assert torch.equal(tensor, run.plain.get_parameter("backbone." + name))


def test_adapters_are_where_they_are_asked_for_and_move_at_their_own_rate(exits, place, tmp_path):
    changes = {"mode": "lora", "lora_rank": 2, "lora_modules": ["q_proj", "down_proj"], "lora_blocks": 2}
    run = exits.start(Accelerator(), configure(place, tmp_path / "run", backbone_rate=0.02, **changes))
    moving = {name.split(".layers.")[1].rsplit(".lora_", 1)[0]
              for name, p in run.plain.backbone.named_parameters() if p.requires_grad}  # fmt: skip
    assert moving == {f"{block}.{name}" for block in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert {g["role"]: g["peak"] for g in run.optimizer.param_groups}["backbone"] == 0.02


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_resumed_run_is_the_uninterrupted_one(exits, place, tmp_path, monkeypatch, mode):
    """Stopped at step 6, with its last checkpoint at 4: the same bits in the end, and the same metrics."""
    changes = dict(mode=mode, lora_rank=2, loss_curriculum="rotational", loss_layer_dropout=0.2)
    whole = exits.main(configure(place, tmp_path / "whole", **changes))
    config, take_step = configure(place, tmp_path / "cut", **changes), exits.train_step

    def stop_at_six(run, step):
        if step == 6:
            raise KeyboardInterrupt
        return take_step(run, step)

    monkeypatch.setattr(exits, "train_step", stop_at_six)
    with pytest.raises(KeyboardInterrupt):
        exits.main(config)
    monkeypatch.setattr(exits, "train_step", take_step)
    assert len(lines(tmp_path / "cut")) == 6
    with pytest.raises(ValueError, match="--resume"):
        exits.main(config)
    assert exits.main(config, resume=True) == whole
    for file in ("metrics.jsonl", "exits.safetensors", "last/state.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert ("perplexity_after" in whole) == (mode != "frozen")
    if mode != "frozen":
        assert whole["perplexity_after"] == pytest.approx(whole["perplexity_before"], rel=0.05)
        assert whole["perplexity_after"] != whole["perplexity_before"]
        assert "final/kl" in whole["eval"]


def test_finished_run_is_not_repeated_and_no_other_run_writes_over_it(exits, place, tmp_path, monkeypatch):
    config = configure(place, tmp_path, steps=1)
    summary = exits.main(config)
    monkeypatch.setattr(exits, "start", None)
    assert exits.main(config) == summary == exits.main(config, resume=True)
    with pytest.raises(ValueError, match="`learning_rate` is 0.003 there, 0.1 now.*another `output`"):
        exits.main(configure(place, tmp_path, steps=1, learning_rate=0.1), resume=True)


def test_accumulated_batches_are_the_large_batch(exits, place, tmp_path):
    """8 x 1 follows 1 x 8 on rows with different numbers of labels; with the exact loss but for rounding."""
    exits.main(configure(place, tmp_path / "large", batch_size=8, loss_negatives=None))
    exits.main(configure(place, tmp_path / "small", batch_size=1, accumulate=8, loss_negatives=None))
    largest, mean = exit_drift(tmp_path / "large", tmp_path / "small")
    assert largest < 1e-4 and mean < 1e-5


def test_two_processes_follow_one(exits, place, tmp_path):
    """The README's command with 2 CPU processes of 4 rows against 1 of 8."""
    one = configure(place, tmp_path / "one", batch_size=8)
    exits.main(one)
    settings = {
        "model": one.model, "data": one.data, "output": str(tmp_path / "two"), "steps": 8, "batch_size": 4,
        "sequence_length": TOKENS, "eval_every": 4, "learning_rate": 3e-3, "exits": asdict(one.exits),
        "loss": asdict(one.loss),
    }  # fmt: skip
    (tmp_path / "two.yaml").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(SCRIPT), "--config", str(tmp_path / "two.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["rows_per_step"] == 8
    largest, mean = exit_drift(tmp_path / "one", tmp_path / "two")
    assert largest < 0.01 and mean < 0.005


def test_broken_training_stops_and_keeps_the_last_good_checkpoint(exits, place, tmp_path, monkeypatch):
    config = configure(place, tmp_path, eval_every=1)
    take_step = exits.train_step

    def poisoned(run, step):
        if step == 2:
            next(run.plain.exits.heads[0].parameters()).data.fill_(float("nan"))
        return take_step(run, step)

    monkeypatch.setattr(exits, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match="loss is nan at step 3.*Lower `learning_rate`"):
        exits.main(config)
    state = load_file(tmp_path / runs.STATE)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert len(lines(tmp_path)) == 2
    EarlyExitModel.from_pretrained(tmp_path / "best")


def test_full_disk_leaves_the_checkpoint_before(exits, place, tmp_path, monkeypatch):
    run = exits.start(Accelerator(), configure(place, tmp_path))
    exits.train_step(run, 0)
    runs.save_state(tmp_path, run.plain, run.optimizer, {"step": 1})
    before = (tmp_path / runs.STATE).read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "save_file", full)
    with pytest.raises(OSError, match="No space left.*untouched.*run it again"):
        runs.save_state(tmp_path, run.plain, run.optimizer, {"step": 2})
    assert (tmp_path / runs.STATE).read_bytes() == before
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["state.safetensors"]


def test_state_of_another_run_and_broken_state_are_refused(exits, place, tmp_path):
    run = exits.start(Accelerator(), configure(place, tmp_path))
    runs.save_state(tmp_path, run.plain, run.optimizer, {"step": 1, "rows_per_step": 4})
    with pytest.raises(ValueError, match="`rows_per_step` is 4 there, 8 now"):
        runs.load_state(tmp_path, run.plain, run.optimizer, {"rows_per_step": 8})
    (tmp_path / runs.STATE).write_bytes((tmp_path / runs.STATE).read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read.*Delete it"):
        runs.load_state(tmp_path, run.plain, run.optimizer, {})
    save_file({"model/x": torch.zeros(1)}, tmp_path / runs.STATE)
    with pytest.raises(ValueError, match="does not say how far training was.*Delete it"):
        runs.load_state(tmp_path, run.plain, run.optimizer, {})


@pytest.mark.parametrize(
    "ids, message",
    [(torch.full((8, TOKENS), VOCAB), f"token {VOCAB}.*0 to {VOCAB - 1}.*another tokenizer"),
     (torch.ones(1, TOKENS), "1 row.*2 at least.*more text")],
)  # fmt: skip
def test_unfit_data_is_refused(exits, place, tmp_path, ids, message):
    data.save_tokens(tmp_path / "bad.safetensors", {"input_ids": ids.int()})
    with pytest.raises(ValueError, match=message):
        exits.main(configure(place, tmp_path / "run", data=[str(tmp_path / "bad.safetensors")]))
    assert not (tmp_path / "run").exists()


def test_unknown_tracker_is_refused(exits, place, tmp_path):
    with pytest.raises(ValueError, match="tracker|log_with|nonsense"):
        exits.main(configure(place, tmp_path, log_with="nonsense"))


def test_wandb_tracks_without_a_network(exits, place, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    exits.main(configure(place, tmp_path / "run", steps=2, eval_every=2, log_with="wandb"))
    (written,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 30  # another process writes it, which a busy machine may keep from it for a while
    while b"exit_3/gate_ece" not in written.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"exit_3/gate_ece" in written.read_bytes()


def test_help_and_typos_answer_at_once():
    """No torch, no accelerate: the answer is there within a second or so."""
    shown = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "--resume" in shown.stdout and "--exits.depths" in shown.stdout
    checked = (
        "import runpy, sys\n"
        "sys.argv = ['exits.py', '--exitz.depths', '1', '--resume']\n"
        f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except ValueError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    typo = subprocess.run([sys.executable, "-c", checked], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "did you mean `--exits.depths`" in typo.stdout and typo.stdout.endswith("False\n"), typo.stdout + typo.stderr


def test_rows_of_token_files_and_texts_fit_together(place, tmp_path):
    """A text of 30 words in rows of 8, beside a token file whose rows are 5 long and padded."""
    words = {"end": 2, "what": 3} | {f"w{number}": number for number in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="what"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end").save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(" ".join(f"w{number}" for number in range(10, 40)))
    made = {"input_ids": [[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]], "attention_mask": [[1, 1, 1, 0, 0], [1] * 5]}
    data.save_tokens(tmp_path / "made.safetensors", {name: np.array(value) for name, value in made.items()})
    both = rows.load_rows([str(tmp_path / "made.safetensors"), str(tmp_path / "texts")], str(tmp_path / "model"), 8)
    assert both["input_ids"].tolist()[:3] == [[5, 6, 7, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 0, 0, 0], list(range(10, 18))]
    assert both["labels"].tolist()[0] == [5, 6, 7] + [-100] * 5 and both["input_ids"].shape == (5, 8)
    assert both["attention_mask"].sum(1).tolist() == [3, 5, 8, 8, 8]
    batch = rows.to_batch(rows.take(both, torch.tensor([0, 1])), torch.device("cpu"))
    assert batch["input_ids"].shape == (2, 5) and batch["attention_mask"].sum() == 8
    assert "attention_mask" not in rows.to_batch(rows.take(both, torch.tensor([2, 3])), torch.device("cpu"))
    with pytest.raises(ValueError, match="fewer than one sequence"):
        rows.load_rows([str(tmp_path / "texts")], str(tmp_path / "model"), 32)


def test_every_row_once_per_pass_in_an_order_of_its_own():
    seen = torch.cat([rows.rows_of_step(step, 10, 4, seed=0) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert rows.rows_of_step(0, 3, 8, seed=0).tolist().count(0) in (2, 3)
    assert torch.equal(rows.rows_of_step(1, 10, 4, seed=0), seen[4:8])
    assert not torch.equal(rows.rows_of_step(1, 10, 4, seed=1), seen[4:8])


def test_paces(exits):
    pace = [exits.pace_at(step, 80) for step in range(80)]
    assert pace[0] == pytest.approx(1 / 1.6) and max(pace) == pace[1] and 0 < pace[79] < 1e-3


def test_rows_without_a_label_are_left_out(exits, place, tmp_path):
    ids = torch.randint(3, VOCAB, (40, TOKENS), dtype=torch.int32)
    labels = ids.clone()
    labels[torch.arange(40) % 4 > 0] = -100
    data.save_tokens(tmp_path / "rows.safetensors", {"input_ids": ids, "labels": labels})
    made = {"data": [str(tmp_path / "rows.safetensors")], "batch_size": 1}
    assert exits.main(configure(place, tmp_path / "run", **made))["step"] == 8
