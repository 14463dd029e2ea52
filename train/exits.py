"""Train exits (in modes `lora` and `full` the backbone too) by distillation from the full model.

    accelerate launch train/exits.py --config configs/demo.yaml
    accelerate launch train/exits.py --config configs/lora.yaml --learning_rate 5e-4 --output runs/lora-5e-4
    accelerate launch --multi_gpu --num_processes 2 train/exits.py --config configs/demo.yaml --resume   # CPUs, too

`--resume` goes on where an interrupted run left off (or starts, if there is none) and ends in the same result. The
output folder gets the model at the end, its gates fitted to what the exits have become, the model as it was when the
held-out loss was lowest (best/), and what `adaptive.runs` lists.
Everything random in a step is a function of (seed, step), so a checkpoint needs no generators and no sampler.
Not covered: `--resume` under FSDP or DeepSpeed, where the optimizer state is in pieces, and fp16's loss scale.
"""
# ruff: noqa: E402

import sys

from adaptive.checked import load_config
from adaptive.config import TrainConfig

if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(TrainConfig, [word for word in sys.argv[1:] if word != "--resume"])

import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from adaptive.closed_form import fit_exits
from adaptive.data import digest
from adaptive.fills import fit_fills
from adaptive.gates import collect, figures, fit_gates
from adaptive.model import EarlyExitModel
from adaptive.rows import Rows, load_rows, num_labelled, rows_of_step, split_rows, take, to_batch
from adaptive.runs import Metrics, earlier_run, load_state, save_state, write_json
from adaptive.states import with_states

WARM_UP, MAX_GRADIENT_NORM = 0.02, 1.0  # a share of the steps; of exits and backbone
# Shares of the learning rate: fresh exits want about 1e-3, adapters 1e-4, whole weights 1e-5; a probe can hurry.
GATE_PACE, BACKBONE_PACE = 3.0, {"frozen": 0.0, "lora": 0.1, "full": 0.01}
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclasses.dataclass
class Run:
    """What every part of a training run needs.

    Attributes:
        prepared, plain: the model with and without accelerate's wrapping.
        progress: what a checkpoint records beside tensors.
    """

    config: TrainConfig
    accelerator: Accelerator
    prepared: torch.nn.Module
    plain: EarlyExitModel
    optimizer: torch.optim.Optimizer
    rows: Rows
    held_out: Rows
    progress: dict

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def sharded(self) -> bool:
        return self.accelerator.distributed_type in SHARDED

    @property
    def judged(self) -> torch.nn.Module:
        # Data parallel wrapping would only send the same buffers around.
        return self.prepared if self.sharded else self.plain


def main(config: TrainConfig, resume: bool = False) -> dict:
    """Trains, and returns the summary that it also writes."""
    accelerator = Accelerator(
        # Said outright, since several processes on CPUs would otherwise not find each other.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=config.accumulate,
        log_with=config.log_with,
        project_dir=config.output,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    resume = resume and accelerator.distributed_type not in SHARDED
    earlier = earlier_run(Path(config.output), record_of(config), resume)
    if earlier is not None:
        accelerator.print(f"{config.output} is finished, with this configuration; nothing to do")
        return earlier
    run = start(accelerator, config)
    if resume:
        same = {name: run.progress[name] for name in ("rows_per_step", "data_sha256")}
        run.progress = load_state(run.folder, run.plain, run.optimizer, same) or run.progress
    done, main_process = run.progress["step"], accelerator.is_main_process
    if done == 0 and config.mode != "frozen":
        run.progress["perplexity_before"] = full_depth_perplexity(run)
    start_trackers(run)
    if main_process:
        write_json(run.folder / "run.json", record_of(config))
        lines = Metrics(run.folder, done)
    bar = tqdm(range(done, config.steps), initial=done, total=config.steps, disable=not main_process)
    for step in bar:
        metrics = train_step(run, step)
        due = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
        if due:
            run.progress["eval"] = evaluate(run)
            accelerator.print("\n" + in_words(run, step + 1))
            metrics |= {f"eval/{name}": value for name, value in run.progress["eval"].items()}
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        accelerator.log(metrics, step=step + 1)
        if main_process:
            lines.write(step + 1, metrics)
        if due:
            checkpoint(run, step + 1)
    return finish(run)


def start(accelerator: Accelerator, config: TrainConfig) -> Run:
    """Returns a run at step 0: data, model, optimizer.

    Raises:
        ValueError: too few rows, or rows of another vocabulary.
    """
    set_seed(config.seed)
    with accelerator.main_process_first():
        rows = load_rows(config.data, config.model, config.sequence_length)
        model = build_model(config, accelerator.device, accelerator.mixed_precision)
    rows, held_out = split_rows(rows, config.seed)
    largest = int(max(rows["input_ids"].max(), held_out["input_ids"].max()))
    if largest >= model.view.vocab_size:
        known = f"0 to {model.view.vocab_size - 1}; made with another tokenizer? Make the rows again"
        raise ValueError(f"`data` has token {largest}; `model` {config.model} knows {known}")
    data_sha256 = digest(rows)
    if config.states and accelerator.distributed_type not in SHARDED:  # a backbone in pieces runs in every step
        with accelerator.main_process_first():
            rows, held_out = (with_states(model, part, Path(config.states)) for part in (rows, held_out))
    fit_exits(model, rows)
    rate, slow = config.learning_rate, config.backbone_rate or config.learning_rate * BACKBONE_PACE[config.mode]
    groups = [
        {"role": "exits", "peak": rate, "params": model.exit_parameters()},
        {"role": "backbone", "peak": slow, "params": model.backbone_parameters()},
        {"role": "gates", "peak": rate * GATE_PACE, "params": model.gate_parameters()},
    ]
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(prepared)
    plain.seed, plain.steps, plain.own_clock = config.seed, config.steps, False
    batch = config.batch_size * config.accumulate * accelerator.num_processes
    progress = {"step": 0, "best": None, "rows_per_step": batch, "data_sha256": data_sha256}
    return Run(config, accelerator, prepared, plain, optimizer, rows, held_out, progress)


def build_model(config: TrainConfig, device: torch.device, mixed_precision: str) -> EarlyExitModel:
    """Returns the backbone with fresh exits on a device, in the mode asked for."""
    # What learns needs float32 to take small steps in; what is frozen keeps its type, which autocast bridges.
    dtype = torch.float32 if mixed_precision == "no" or config.mode == "full" else "auto"
    model = EarlyExitModel.from_backbone(config.model, config.exits, config.loss, dtype=dtype)
    if config.mode == "lora":
        from peft import LoraConfig, get_peft_model

        # After the exits were made: a block head is a copy of plain blocks.
        rank, beyond = config.lora_rank, model.modules_from(config.lora_blocks or model.view.num_layers)
        where = {"target_modules": config.lora_modules or "all-linear", "exclude_modules": beyond}
        model.backbone = get_peft_model(model.backbone, LoraConfig(r=rank, lora_alpha=2 * rank, **where))
    model.exits.float()
    # Before the mode: the teacher copy of mode `full` is made where it will run.
    model.to(device).train_mode(config.mode)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def train_step(run: Run, step: int) -> dict[str, float]:
    """Takes one optimizer step, if loss and gradient are finite; returns the mean metrics over all its sequences."""
    config, accelerator, model = run.config, run.accelerator, run.prepared
    model.train()
    run.plain.step = step
    torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + accelerator.process_index)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * pace_at(step, config.steps)
    indices = rows_of_step(step, len(run.rows["input_ids"]), run.progress["rows_per_step"], config.seed)
    labelled = num_labelled(take(run.rows, indices))
    parts = []
    shares = indices.view(config.accumulate, accelerator.num_processes, config.batch_size)
    for share in shares[:, accelerator.process_index]:
        batch = to_batch(take(run.rows, share), accelerator.device)
        with accelerator.accumulate(model):
            out = model(**batch, num_items_in_batch=labelled)
            # The loss is a sum over all the step's tokens; accelerate divides by both of these.
            accelerator.backward(out.loss * (config.accumulate * accelerator.num_processes))
        own = num_labelled(batch)
        parts.append((own, {"loss": out.loss.detach() * (labelled / max(own, 1)), **out.metrics}))
    metrics = mean_over_processes(parts)
    stop_unless_finite(run, step, "loss", metrics["loss"])
    # Gates are left out: their gradient must not shorten an exit's step, and Adam keeps theirs in bounds.
    others = [p for group in run.optimizer.param_groups if group["role"] != "gates" for p in group["params"]]
    norm = accelerator.clip_grad_norm_(others, MAX_GRADIENT_NORM)
    if accelerator.scaler is None and norm is not None:
        metrics["gradient_norm"] = float(norm)
        stop_unless_finite(run, step, "gradient", metrics["gradient_norm"])
    run.optimizer.step()
    run.optimizer.zero_grad()
    return metrics | {f"learning_rate/{group['role']}": group["lr"] for group in run.optimizer.param_groups}


def stop_unless_finite(run: Run, step: int, name: str, value: float) -> None:
    """Raises FloatingPointError when training has broken down; every process sees the same value and stops too."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {name} is {value} at step {step + 1}. Nothing of it was saved; best/ and last/ are older. Lower "
            f"`learning_rate` (now {run.config.learning_rate}) and train into another `output`"
        )


def pace_at(step: int, steps: int) -> float:
    """Share of the peak learning rate in a step: linear warm-up, then cosine to 0."""
    return min(1.0, (step + 1) / max(WARM_UP * steps, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def mean_over_processes(parts: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    """Mean of each metric over forward passes on all processes, given as (labelled positions, metrics per position)."""
    names = [(name, weight) for weight, metrics in parts for name in metrics]
    values = torch.stack([value.float() for _, metrics in parts for value in metrics.values()]).tolist()
    sums: dict[str, list[float]] = {}
    for (name, weight), value in gather_object(list(zip(names, values))):
        if weight:
            total = sums.setdefault(name, [0.0, 0])
            total[0], total[1] = total[0] + value * weight, total[1] + weight
    return {name: total / weight for name, (total, weight) in sums.items()}


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Mean metrics on the held-out rows; every process works through all of them."""
    run.prepared.eval()
    run.plain.step = 0  # the same draw of the vocabulary each time: losses compare
    parts = []
    for indices in held_out_batches(run, run.config.batch_size):
        batch = to_batch(take(run.held_out, indices), run.accelerator.device)
        out = run.judged(**batch)
        parts.append((num_labelled(batch), {"loss": out.loss, **out.metrics}))
    return mean_over_processes(parts)


@torch.no_grad()
def full_depth_perplexity(run: Run) -> float:
    """Perplexity of the full depth on the held-out rows."""
    run.prepared.eval()
    total = 0.0
    for indices in held_out_batches(run, 1):
        batch = to_batch(take(run.held_out, indices), run.accelerator.device)
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = run.judged(**batch).logits[:, :-1].flatten(0, 1).float()
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
    return math.exp(min(total / max(num_labelled(run.held_out), 1), 700.0))


def held_out_batches(run: Run, size: int):
    """Yields indices of held-out rows behind a progress bar."""
    batches = torch.arange(len(run.held_out["labels"])).split(size)
    yield from tqdm(batches, desc="evaluating", leave=False, disable=not run.accelerator.is_main_process)


def checkpoint(run: Run, step: int) -> None:
    """Writes best/, if the held-out loss is the lowest so far, and then last/; neither if it is not finite."""
    run.progress["step"], loss = step, run.progress["eval"]["loss"]
    stop_unless_finite(run, step - 1, "held-out loss", loss)
    if run.progress["best"] is None or loss < run.progress["best"]:
        run.progress["best"] = loss
        save_model(run, run.folder / "best")
    if run.accelerator.is_main_process and not run.sharded:
        save_state(run.folder, run.plain, run.optimizer, run.progress)
    run.accelerator.wait_for_everyone()


def finish(run: Run) -> dict:
    """Fits gates and K/V, saves model and summary, says what came out, and returns the summary."""
    summary = {"config": record_of(run.config), **run.progress}
    if run.config.mode != "frozen":
        summary["perplexity_after"] = full_depth_perplexity(run)
        told = "full depth on held-out rows: perplexity {perplexity_before:.3f} before, {perplexity_after:.3f} after"
        run.accelerator.print(told.format(**summary))
    parts = (run.rows, run.held_out) if run.plain.exits.gates[0].learned else ()  # every process finds the same
    settings = run.accelerator.device, run.config.seed, run.config.gate_tokens, run.config.batch_size
    found = [collect(run.judged, part, *settings) for part in parts]
    model = save_model(run, run.folder, True, *found[:1])
    if run.accelerator.is_main_process:
        summary["gates"] = figures(model.exits.gates, *found[1], model.depths) if found else None
        write_json(run.folder / "summary.json", summary)
        print(json.dumps(summary))
    run.accelerator.end_training()
    return summary


def save_model(run: Run, folder: Path, last: bool = False, examples: tuple | None = None) -> EarlyExitModel:
    """Writes the model for `EarlyExitModel.from_pretrained`, put together again where it lies in pieces, after fitting
    its gates to examples if there are any, and K/V to what will leave; returns what the main process wrote."""
    model = run.plain
    if run.sharded:
        tensors = run.accelerator.get_state_dict(run.prepared)
        if run.accelerator.is_main_process:
            model = build_model(run.config, torch.device("cpu"), run.accelerator.mixed_precision)
            model.load_state_dict(tensors)
    if run.accelerator.is_main_process:
        if examples is not None:
            fit_gates(model.exits.gates, *examples, run.config.seed)
        if last or run.config.mode != "frozen":  # what skipped blocks would have made has moved
            fit_fills(model, run.rows, run.config.fill_tokens)
        model.save_pretrained(folder)
    run.accelerator.wait_for_everyone()
    return model


def record_of(config: TrainConfig) -> dict:
    """The configuration as JSON has it, without what changes no number."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in values.items() if name not in ("output", "states", "log_with")}


def start_trackers(run: Run) -> None:
    """Raises ValueError when the tracker asked for is not installed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    flat = {k: value if isinstance(value, int | float) else str(value) for k, value in record_of(run.config).items()}
    run.accelerator.init_trackers("adaptive", config=flat, init_kwargs={"wandb": {"dir": run.config.output}})
    if run.config.log_with and run.accelerator.is_main_process and not run.accelerator.trackers:
        raise ValueError(f"`log_with` is {run.config.log_with!r}, which is not installed. Install it, or leave it out")


def in_words(run: Run, step: int) -> str:
    """One line about an evaluation."""
    found = {name: f"{value:.3f}" for name, value in run.progress["eval"].items()}
    names = [f"exit_{depth}" for depth in run.plain.depths]
    each = [f"; {name}: {found[f'{name}/loss']} nats, agrees {found[f'{name}/agreement']}" for name in names]
    return f"step {step}, held out: loss {found['loss']}" + "".join(each)


if __name__ == "__main__":
    main(CONFIG, "--resume" in sys.argv)
