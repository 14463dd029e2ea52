"""Time training steps and generation against transformers, in interleaved rounds within one process.

    python eval/speed.py --model runs/demo
    python eval/speed.py --what decode --batch_sizes 1 --dtype bfloat16 --threads 2 --output results/speed-bf16.json

Every round runs every engine once, each round in another order: what slows the machine down slows all of them. Ratios are
taken within a round; the median, smallest and largest over the rounds are reported. The texts are the model's own samples.

"train": one optimizer step on three exits of a frozen backbone, while exits move and while only gates do, against a forward
pass of the backbone alone on the same tokens (no gradients, logits at every position, no K/V kept); and the memory it makes.
"decode": all engines continue the same prompts greedily by the same number of tokens. A forced pattern lets a fixed share
of tokens leave at L/3 or 2L/3, whatever the gate says (it is asked all the same): at every token that share of the rows or,
in patterns named `together`, all rows at that share of the tokens. `decode_` figures leave out everything up to the first
new token. The ideal speed-up is what `adaptive/costs.py` makes of the trace: by FLOPs, and by bytes of a row that is alone.
Engines that refuse are listed with their error.

The last line of stdout is one JSON document, which --output gets too.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from adaptive.config import Checked, load_config


@dataclass
class SpeedConfig(Checked):
    """What to time.

    Attributes:
        model: folder of a trained run, or id or folder of a model, which then gets untrained exits
        what: sections: training steps (train), generation (decode)
        batch_sizes: rows generated at once
        new_tokens: tokens that every row generates
        prompt_tokens: tokens of every prompt
        shares: percent of the tokens that leave, one forced pattern each
        rounds: timed runs of every engine
        threads: of torch; none = its default
        dtype: of the backbone's weights
        device: where to run; none = the accelerator if there is one
        compile: let transformers compile what runs on its static cache
        seed: of texts and training steps
        output: JSON file to write
    """

    model: str = "smollm2-135m-instruct"
    what: list[Literal["train", "decode"]] = field(default_factory=lambda: ["train", "decode"])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    new_tokens: int = 48
    prompt_tokens: int = 64
    shares: list[int] = field(default_factory=lambda: [25, 50, 75])
    rounds: int = 5
    threads: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    compile: bool = False
    seed: int = 0
    output: str = "results/speed.json"

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(2, "new_tokens", "prompt_tokens") + self._below(1, "rounds", "threads") + self._below(0, "seed")
        found += [f"`{name}` is empty; give at least one" for name in ("what", "batch_sizes") if not getattr(self, name)]
        found += [f"`batch_sizes` has {size}; each must be 1 or more" for size in self.batch_sizes if size < 1]
        return found + [f"`shares` has {s}; each must be 0 to 100 percent" for s in self.shares if not 0 <= s <= 100]


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(cls=SpeedConfig)

import dataclasses
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import weakref
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoModelForCausalLM, CompileConfig

import adaptive
from adaptive.config import ExitConfig, LossConfig
from adaptive.model import EarlyExitModel
from adaptive.policy import ExitPolicy, Trace
from adaptive.pretrained import resolve
from adaptive.runs import write_json
from adaptive.storage import CONFIG as EXIT_CONFIG

TRAIN_ROWS, TRAIN_TOKENS, TRAIN_EXITS = 4, 256, 3
REFERENCES = ("hf_dynamic", "full_depth")  # what ratios are taken to; without them there is nothing to report


def main(config: SpeedConfig) -> dict:
    """Writes and returns the document."""
    transformers.utils.logging.set_verbosity_error()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    plain, trained = load(config, device)
    room, longest = plain.view.max_context, config.prompt_tokens + config.new_tokens
    if "decode" in config.what and room is not None and longest > room:
        raise ValueError(f"`prompt_tokens` + `new_tokens` is {longest}, the context of {config.model} {room}; lower one")
    document = {"provenance": provenance(config, device), "config": dataclasses.asdict(config)}
    if "train" in config.what:
        document["train"] = time_training(config, trained or plain)
    if "decode" in config.what:
        prompts = written(plain, max(config.batch_sizes), config.prompt_tokens, config.seed)
        document["decode"] = [time_decoding(config, plain, trained, prompts[:size]) for size in config.batch_sizes]
    last_line = json.dumps(document, allow_nan=False)
    write_json(Path(config.output), document)
    print(in_words(document))
    print(last_line)
    return document


def load(config: SpeedConfig, device: torch.device) -> tuple[EarlyExitModel, EarlyExitModel | None]:
    """Returns the backbone with untrained exits at L/3 and 2L/3, and the same backbone with its trained ones, if any."""
    trained, blocks = None, None
    if (Path(config.model) / EXIT_CONFIG).is_file():
        trained = EarlyExitModel.from_pretrained(config.model, dtype=config.dtype).to(device)
        backbone, blocks = trained.backbone, trained.exit_config.blocks
    else:
        backbone = AutoModelForCausalLM.from_pretrained(resolve(config.model), dtype=config.dtype).to(device)
    layers = backbone.config.get_text_config().num_hidden_layers
    exits = ExitConfig(depths=[layers // 3, 2 * layers // 3], head="norm", blocks=blocks)
    return EarlyExitModel.from_backbone(backbone, exits), trained


def written(model: EarlyExitModel, rows: int, tokens: int, seed: int) -> Tensor:
    """Returns ids [rows, tokens] that the full model samples from nothing but its first token."""
    ids = (model.generation_config.bos_token_id, model.config.bos_token_id, model.config.eos_token_id)
    start = torch.full((rows, 1), next((i for i in ids if isinstance(i, int)), 0), device=model.device)
    return model.generate(
        input_ids=start, attention_mask=torch.ones_like(start), policy=ExitPolicy.full(model.num_exits), seed=seed,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens - 1, min_new_tokens=tokens - 1)


def interleaved(runs: dict[str, Callable], rounds: int, title: str) -> dict[str, list]:
    """Returns what each of `runs` returned, once per round; every round begins with another one."""
    names, found = list(runs), {name: [] for name in runs}
    for turn in tqdm(range(rounds), desc=title):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(runs[name]())
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Returns median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(values: list[float], to: list[float]) -> dict[str, float]:
    """Returns the spread of `values` over `to`, round by round."""
    return spread([a / b for a, b in zip(values, to, strict=True)])


def wait() -> None:
    """Lets an accelerator finish what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Allocations(TorchDispatchMode):
    """Follows the tensors that operations return while it is active; what a kernel uses inside is not seen.

    Attributes:
        largest: numbers in the largest of them.
        maker: the operation that made it.
        peak: bytes of those that were alive at once, at most.
    """

    def __init__(self):
        super().__init__()
        self.largest, self.maker, self.alive, self.peak = 0, "", 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Views and what is changed in place share the storage of something given.
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                known.add(storage._cdata)
                if tensor.numel() > self.largest:
                    self.largest, self.maker = tensor.numel(), str(func)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.alive -= size


def time_training(config: SpeedConfig, model: EarlyExitModel) -> dict:
    """Returns the section "train". The exits are fresh ones, made as the model's own are if it has three of them."""
    layers, exits, loss = model.view.num_layers, model.exit_config, model.loss_config
    if model.num_exits != TRAIN_EXITS:
        depths = [part * layers // (TRAIN_EXITS + 2) for part in range(2, TRAIN_EXITS + 2)]
        exits, loss = ExitConfig(depths=depths, blocks=exits.blocks), LossConfig()
    learner = EarlyExitModel.from_backbone(model.backbone, exits, loss).train()
    learner.exits.float()
    learner.seed = config.seed
    optimizer = torch.optim.AdamW(learner.exit_parameters() + learner.gate_parameters(), lr=1e-3)
    ids = written(model, TRAIN_ROWS, min(TRAIN_TOKENS, model.view.max_context or TRAIN_TOKENS), config.seed)

    def forward() -> None:
        with torch.no_grad():
            model.backbone(input_ids=ids, use_cache=False)

    def step(gates_only: bool) -> None:
        learner.gates_only = gates_only
        # A backbone of low precision is bridged to exits of full precision as training does it.
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            learned = learner(input_ids=ids, labels=ids).loss
        learned.backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.step += 1

    def seconds(run: Callable) -> float:
        wait()
        start = perf_counter()
        run()
        wait()
        return perf_counter() - start

    runs = {"forward": forward, "step": partial(step, False), "gates_only_step": partial(step, True)}
    logits, memory = ids.numel() * model.view.vocab_size, {}
    for name, run in runs.items():
        run()  # caches warm up, and the optimizer makes its state, which stays
        with Allocations() as made:
            run()
        memory[name] = {"largest_tensor": made.largest, "made_by": made.maker, "peak_bytes": made.peak,
                        "largest_tensor_of_logits": made.largest / logits}
    took = interleaved({name: partial(seconds, run) for name, run in runs.items()}, config.rounds, "training steps")
    return {
        "rows": len(ids), "tokens": ids.shape[1], "depths": list(learner.depths), "heads": learner.exits.kinds,
        "negatives": loss.negatives, "seconds": {name: spread(values) for name, values in took.items()},
        "ratio": {name: ratio(took[name], took["forward"]) for name in runs if name != "forward"},
        "memory": memory | {"logits_of_one_exit": logits, "bytes_of_all_exits_logits": TRAIN_EXITS * 4 * logits},
    }


@dataclass(frozen=True)
class Forced(ExitPolicy):
    """Lets a fixed share of tokens leave at one exit, whatever its gate says. Good for one call of `generate` in which no
    row ends early: it counts the tokens by how often it is asked.

    Attributes:
        percent: share of the tokens that leave.
        together: all rows leave at the same tokens; else they take turns, the same share of them at every token.
    """

    percent: int = 0
    together: bool = False
    clock: Iterator[int] = field(default_factory=itertools.count)

    def leaves(self, exit: int, scores: np.ndarray) -> np.ndarray:
        """Returns who leaves [rows] bool: the share is spread evenly over the tokens of each row."""
        turn = next(self.clock) + (0 if self.together else 1) * np.arange(len(scores))
        return (turn + 1) * self.percent // 100 > turn * self.percent // 100


class Stopwatch:
    """A streamer that notes when tokens come: the prompt first, and then new ones."""

    def __init__(self):
        self.start, self.marks = perf_counter(), []

    def put(self, ids: Tensor) -> None:
        """Notes the time, and how many tokens these are."""
        self.marks.append((perf_counter(), ids.numel()))

    def end(self) -> None:
        """Nothing is left to do."""

    def rates(self) -> tuple[float, float]:
        """Returns tokens per second of the whole call, and of what came after the first new token."""
        marks = self.marks[1:]
        whole = sum(count for _, count in marks) / (marks[-1][0] - self.start)
        if len(marks) == 1:  # all came at once
            return whole, whole
        return whole, sum(count for _, count in marks[1:]) / (marks[-1][0] - marks[0][0])


def engines(config: SpeedConfig, plain: EarlyExitModel, trained: EarlyExitModel | None, prompts: Tensor) -> dict:
    """Returns the engines by name: functions of a streamer that return ids [rows, tokens], and the trace if it is ours."""
    settings = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "do_sample": False,
                "max_new_tokens": config.new_tokens, "min_new_tokens": config.new_tokens}
    compiling = {"disable_compile": True}
    if config.compile:
        compiling = {"compile_config": CompileConfig()}
        compiling["compile_config"]._compile_all_devices = True  # transformers would not on a CPU

    def theirs(streamer, **kwargs) -> tuple[Tensor, None]:
        shape, layers = plain.view.config, plain.view.num_layers
        try:
            return plain.backbone.generate(**settings, streamer=streamer, **kwargs), None
        finally:
            shape.num_hidden_layers = layers  # an early exit that fails leaves its own number there

    def ours(streamer, model: EarlyExitModel, policy: Callable) -> tuple[Tensor, Trace]:
        out = model.generate(**settings, policy=policy(), streamer=streamer, return_dict_in_generate=True)
        return out.sequences, out.trace

    found = {
        "hf_dynamic": theirs,
        "hf_static": partial(theirs, cache_implementation="static", **compiling),
        "hf_assistant_early_exit": partial(theirs, assistant_early_exit=plain.depths[0]),
        "full_depth": partial(ours, model=plain, policy=partial(ExitPolicy.full, plain.num_exits)),
    }
    arrangements = {"": False} if len(prompts) == 1 else {"": False, "_together": True}
    for (index, depth), share, (suffix, together) in itertools.product(
            enumerate(plain.depths), config.shares, arrangements.items()):
        only = ExitPolicy.always(index, plain.num_exits).thresholds
        found[f"forced_{share}_at_{depth}{suffix}"] = partial(
            ours, model=plain, policy=partial(Forced, only, percent=share, together=together))
    if trained is not None and trained.certificate is not None:
        found["certified"] = partial(ours, model=trained, policy=lambda: trained.policy)
    return found


def time_decoding(config: SpeedConfig, plain: EarlyExitModel, trained: EarlyExitModel | None, prompts: Tensor) -> dict:
    """Returns the section "decode" for one batch of prompts [rows, tokens]."""
    running, said, refused = engines(config, plain, trained, prompts), {}, []
    for name, engine in list(running.items()):
        try:  # untimed, and greedy: what comes out now comes out in every round
            said[name] = engine(Stopwatch())
            if (length := said[name][0].shape[1]) != prompts.shape[1] + config.new_tokens:
                raise ValueError(f"gave {length - prompts.shape[1]} new tokens where {config.new_tokens} were wanted")
        except Exception as error:
            if name in REFERENCES:
                raise
            del running[name]
            refused.append({"engine": name, "error": f"{type(error).__name__}: {error}"})

    def rates(engine: Callable) -> tuple[float, float]:
        watch = Stopwatch()
        engine(watch)
        return watch.rates()

    timed = interleaved({name: partial(rates, engine) for name, engine in running.items()}, config.rounds,
                        f"decoding, batch {len(prompts)}")
    timed = {name: dict(zip(("", "decode_"), zip(*values, strict=True), strict=True)) for name, values in timed.items()}
    expected, found = said["hf_dynamic"][0][:, prompts.shape[1]:], []
    for name in running:
        ids, trace = said[name]
        entry = {"engine": name, "tokens_as_hf": float((ids[:, prompts.shape[1]:] == expected).float().mean())}
        for kind, values in timed[name].items():
            entry[f"{kind}tokens_per_second"] = spread(values)
            entry |= {f"{kind}over_{other}": ratio(values, timed[other][kind]) for other in REFERENCES}
        if trace is not None:
            price = (trained if name == "certified" else plain).costs.price(trace)
            ideal = {"bytes_batch_1": 1 / price.relative_bytes, "flops": 1 / price.relative_flops}
            realised = {kind: entry["decode_over_full_depth"]["median"] / value for kind, value in ideal.items()}
            entry |= {"mean_depth": trace.mean_depth, "depths": list(trace.exits), "shares": trace.shares,
                      "ideal": ideal, "realised_of_ideal": realised}
        found.append(entry)
    equal = bool(torch.equal(said["full_depth"][0], said["hf_dynamic"][0]))
    return {"batch": len(prompts), "full_depth_equals_hf": equal, "engines": found + refused}


def provenance(config: SpeedConfig, device: torch.device) -> dict:
    """Returns what made the figures, and on what."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent,
                         capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "command": shlex.join(["python", *sys.argv]), "commit": git.stdout.strip() or None, "model": config.model,
        "seed": config.seed, "threads": torch.get_num_threads(), "dtype": config.dtype,
        "machine": {"kind": device.type, "system": f"{platform.system()} {platform.machine()}", "cpu": cpu,
                    "cores": os.cpu_count(),
                    "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "adaptive": adaptive.__version__},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def in_words(document: dict) -> str:
    """Returns the medians as text."""
    lines, train = [f"{document['provenance']['threads']} thread(s), {document['config']['dtype']}"], document.get("train")
    for name in ("step", "gates_only_step") if train else ():
        lines.append(f"{name}: {train['ratio'][name]['median']:.2f}x a forward pass; its largest tensor has "
                     f"{train['memory'][name]['largest_tensor_of_logits']:.2f} of one exit's logits")
    for part in document.get("decode", []):
        lines.append(f"batch {part['batch']}; full depth gives the tokens of HF: {part['full_depth_equals_hf']}")
        for entry in part["engines"]:
            if "error" in entry:
                lines.append(f"  {entry['engine']:26} refused: {entry['error'].splitlines()[0][:80]}")
                continue
            speed, to_hf, to_full = (entry[name]["median"] for name in (
                "tokens_per_second", "over_hf_dynamic", "decode_over_full_depth"))
            ideal = "".join(f"  ideal by {kind} {value:.2f}x" for kind, value in entry.get("ideal", {}).items())
            lines.append(f"  {entry['engine']:26} {speed:8.1f} tokens/s  {to_hf:.2f}x HF  {to_full:.2f}x full depth{ideal}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(CONFIG)
