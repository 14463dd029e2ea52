"""Time training steps and generation against transformers, in interleaved rounds within one process.

    python eval/speed.py --model runs/demo
    python eval/speed.py --what decode --batch_sizes 1 --dtype bfloat16 --threads 2 --output results/speed-bf16.json

Every round runs every engine once, in another order. Ratios are of one round: the median, smallest and largest of them.

"train": an optimizer step on three exits of a frozen backbone, while exits move and while only gates do, over a
forward pass of the backbone alone on the same tokens (no gradients, all logits, no K/V); and the memory that they take.
"decode": every engine continues the same prompts greedily by the same number of tokens. Forced patterns let a share of
the tokens leave at L/3 or 2L/3, whatever the gate says (it is asked all the same): that share of the rows at every
token or, named `together`, all rows at that share of the tokens. `decode_` figures are without what comes up to the
first new token, `_graphs` is on a static cache. The ideal is `adaptive/costs.py` on the trace: by FLOPs, and by bytes
of a row alone in its batch. Prompts are the model's own samples, tokens at random, or pieces of a text file. Engines
that refuse are listed with their error. The last line of stdout is one JSON document, which --output gets too.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from adaptive.checked import Checked, load_config


@dataclass
class SpeedConfig(Checked):
    """What to time.

    Attributes:
        model: folder of a trained run, or id or folder of a model, which then gets untrained exits
        what: sections: training steps (train), generation (decode)
        batch_sizes: rows generated at once
        new_tokens: tokens that every row generates
        prompt_tokens: tokens of every prompt
        prompts: "sampled" by the model, "random" tokens, or a text file to take pieces of
        only: beginnings of names of engines to time beside transformers and the own full depth; none = all
        shares: percent of the tokens that leave, one forced pattern each
        rounds: timed runs of every engine
        threads: of torch; none = its default
        dtype: of the backbone's weights
        compile: let transformers compile what it runs on a static cache
        seed: of texts and training steps
        output: JSON file to write
    """

    model: str = "smollm2-135m-instruct"
    what: list[Literal["train", "decode"]] = field(default_factory=lambda: ["train", "decode"])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    new_tokens: int = 48
    prompt_tokens: int = 64
    prompts: str = "sampled"
    only: list[str] = field(default_factory=list)
    shares: list[int] = field(default_factory=lambda: [25, 50, 75])
    rounds: int = 5
    threads: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    seed: int = 0
    output: str = "results/speed.json"

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(2, "new_tokens", "prompt_tokens") + self._below(1, "rounds", "threads")
        if not self.what or not self.batch_sizes or min(self.batch_sizes) < 1:
            found.append(f"`what` is {self.what}, `batch_sizes` {self.batch_sizes}; give one each, of 1 row or more")
        found += [f"`shares` has {share}; each must be from 0 to 100" for share in self.shares if not 0 <= share <= 100]
        if self.prompts not in ("sampled", "random") and not Path(self.prompts).is_file():
            found.append(f"`prompts`={self.prompts!r} is no file; give one, or sampled, or random")
        return found + self._below(0, "seed")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(SpeedConfig)

import itertools
import json
from collections.abc import Callable
from functools import cache, partial
from time import perf_counter
from timeit import timeit
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch import Tensor

from adaptive.certify import load_tokenizer
from adaptive.config import ExitConfig, LossConfig
from adaptive.measure import Allocations, interleaved, spread
from adaptive.model import EarlyExitModel
from adaptive.policy import ExitPolicy, Progress, Trace
from adaptive.pretrained import resolve
from adaptive.provenance import provenance
from adaptive.runs import write_json
from adaptive.storage import CONFIG as EXIT_CONFIG

TRAIN_ROWS, TRAIN_TOKENS, TRAIN_EXITS = 4, 256, 3
REFERENCES = ("hf_dynamic", "full_depth")  # what ratios are taken to: when these fail there is nothing to report
COMPARED = (*REFERENCES, "full_depth_graphs")
SHOWN = ("tokens_per_second", "over_hf_dynamic", "decode_over_full_depth")


def main(config: SpeedConfig) -> dict:
    """Writes and returns the document."""
    transformers.utils.logging.set_verbosity_error()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    plain, trained = load(config, device)
    room, wanted = plain.view.max_context or sys.maxsize, config.prompt_tokens + config.new_tokens
    if "decode" in config.what and wanted > room:
        raise ValueError(f"`prompt_tokens` + `new_tokens` is {wanted}, the model's context {room}; lower one of them")
    source = {name: getattr(config, name) for name in ("model", "seed", "dtype")}
    document = {"provenance": provenance() | source, "config": asdict(config)}
    if "train" in config.what:
        document["train"] = time_training(config, trained or plain)
    if "decode" in config.what:
        prompts = chosen(config, plain)
        document["decode"] = [time_decoding(config, plain, trained, prompts[:size]) for size in config.batch_sizes]
    write_json(Path(config.output), document)
    print(json.dumps(document, allow_nan=False))
    return document


def load(config: SpeedConfig, device: torch.device) -> tuple[EarlyExitModel, EarlyExitModel | None]:
    """Returns the backbone with untrained exits at L/3 and 2L/3, and (or None) the same backbone with trained ones."""
    trained, path = None, None
    if (Path(config.model) / EXIT_CONFIG).is_file():
        trained = EarlyExitModel.from_pretrained(config.model, dtype=config.dtype).to(device)
        backbone, path = trained.backbone, trained.exit_config.blocks
    else:
        backbone = transformers.AutoModelForCausalLM.from_pretrained(resolve(config.model), dtype=config.dtype)
    layers = backbone.config.get_text_config().num_hidden_layers
    exits = ExitConfig(depths=[layers // 3, 2 * layers // 3], head="norm", blocks=path)
    return EarlyExitModel.from_backbone(backbone, exits).to(device), trained


def written(model: EarlyExitModel, rows: int, tokens: int, seed: int) -> Tensor:
    """Returns ids [rows, tokens] that the full model samples from nothing but a first token."""
    ids = (model.generation_config.bos_token_id, model.config.bos_token_id, model.config.eos_token_id)
    start = torch.full((rows, 1), next((i for i in ids if isinstance(i, int)), 0), device=model.device)
    full, more = ExitPolicy.full(model.num_exits), tokens - 1
    return model.generate(start, attention_mask=torch.ones_like(start), policy=full, seed=seed, do_sample=True,
                          temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=more, min_new_tokens=more)


def chosen(config: SpeedConfig, model: EarlyExitModel) -> Tensor:
    """Returns prompts [rows, tokens].

    Raises:
        ValueError: the text file is too short.
    """
    rows, tokens = max(config.batch_sizes), config.prompt_tokens
    if config.prompts == "sampled":
        return written(model, rows, tokens, config.seed)
    if config.prompts == "random":
        generator = torch.Generator().manual_seed(config.seed)
        return torch.randint(model.view.vocab_size, (rows, tokens), generator=generator).to(model.device)
    text = Path(config.prompts).read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(model)(text, add_special_tokens=False).input_ids, device=model.device)
    if len(ids) < rows * tokens:
        raise ValueError(f"{config.prompts} has {len(ids)} tokens; {rows} prompts of {tokens} are wanted")
    return torch.stack([part[:tokens] for part in ids.tensor_split(rows)])


def time_training(config: SpeedConfig, model: EarlyExitModel) -> dict:
    """Returns the section "train". The exits are fresh; they are made as the model's own are if it has three."""
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
            model.backbone(input_ids=ids, use_cache=False).logits[0, -1, 0].item()

    def step() -> None:
        # As in training, where autocast bridges a backbone of low precision and exits of full precision.
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            learned = learner(input_ids=ids, labels=ids).loss
        learned.backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.step += 1
        learned.item()  # an accelerator is waited for, here and above

    runs = {"forward": forward, "step": step}
    logits, memory = ids.numel() * model.view.vocab_size, {}
    for name, run in runs.items():
        run()  # the optimizer makes its state, which stays
        with Allocations() as made:
            run()
        smaller = made.largest < logits
        memory[name] = {"largest_tensor": made.largest, "below_logits_of_one_exit": smaller, "peak_bytes": made.peak}
    once = {name: partial(timeit, run, number=1) for name, run in runs.items()}
    took = interleaved(once, config.rounds, "training steps")
    return {
        "rows": len(ids), "tokens": ids.shape[1], "exits": asdict(exits), "loss": asdict(loss),
        "seconds": {name: spread(values) for name, values in took.items()},
        "ratio": {name: spread(took[name], took["forward"]) for name in runs if name != "forward"},
        "memory": memory | {"logits_of_one_exit": logits, "bytes_of_all_logits": learner.num_exits * 4 * logits},
    }


@dataclass(frozen=True)
class Forced(ExitPolicy):
    """Lets a fixed share of tokens leave at the one exit that is open, whatever the gate says, where no row ends early.

    Attributes:
        percent: share of the tokens that leave.
        together: all rows leave at the same tokens; else they take turns, the same share of them at every token.
    """

    percent: int = 0
    together: bool = False

    def leaves(self, exit: int, scores: np.ndarray, progress: Progress) -> np.ndarray:
        """Returns who leaves, [rows] bool; each row's share is spread evenly over its tokens."""
        turn = progress.tokens + (not self.together) * np.arange(len(scores))
        return (turn + 1) * self.percent // 100 > turn * self.percent // 100


def rates(engine: Callable) -> tuple[float, float]:
    """Returns tokens per second of a whole call, and of what came after the first new tokens."""
    marks, start = [], perf_counter()
    engine(SimpleNamespace(put=lambda ids: marks.append((perf_counter(), ids.numel())), end=lambda: None))
    (first, count), *later = marks[1:]  # the prompt is streamed before anything new
    last, rest = marks[-1][0], sum(count for _, count in later)
    whole = (count + rest) / (last - start)
    return whole, rest / (last - first) if later else whole


def engines(config: SpeedConfig, plain: EarlyExitModel, trained: EarlyExitModel | None, prompts: Tensor) -> dict:
    """Returns the engines by name: streamer -> ids [rows, tokens] and, if the engine is ours, the trace."""
    # No token ends a row. `min_new_tokens` would have it so as well, by a pass over the vocabulary for every token.
    settings = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "do_sample": False,
                "max_new_tokens": config.new_tokens, "eos_token_id": -1}
    compiling = transformers.CompileConfig()
    compiling._compile_all_devices = True  # on a CPU it would not by itself

    def theirs(streamer, **kwargs) -> tuple[Tensor, None]:
        shape, layers = plain.view.config, plain.view.num_layers
        try:
            return plain.backbone.generate(**settings, streamer=streamer, **kwargs), None
        finally:
            shape.num_hidden_layers = layers  # an early exit that fails leaves its own number there

    def ours(streamer, model: EarlyExitModel, policy: ExitPolicy, kv="propagate", **more) -> tuple[Tensor, Trace]:
        out = model.generate(**settings, policy=policy, kv=kv, streamer=streamer, return_dict_in_generate=True, **more)
        return out.sequences, out.trace

    def peer(streamer, technique: str, threshold: float) -> tuple[Tensor, None]:
        said = economized(plain, technique, threshold).decode_batch(prompts, config.new_tokens)
        ids = torch.cat([prompts, torch.stack([row.tokens for row in said]).to(prompts.device)], dim=1)
        if streamer is not None:  # it knows none: all comes at once, prefill included
            streamer.put(prompts)
            streamer.put(ids[:, prompts.shape[1] :])
        return ids, None

    static = {"cache_implementation": "static", "compile_config": compiling, "disable_compile": not config.compile}
    found = {
        "hf_dynamic": theirs,
        "hf_static": partial(theirs, **static),
        "hf_assistant_early_exit": partial(theirs, assistant_early_exit=plain.depths[0]),
        "economize_calm_nobody_leaves": partial(peer, technique="calm", threshold=1.0),
        "economize_calm_all_leave": partial(peer, technique="calm", threshold=0.0),
        "economize_early_exit": partial(peer, technique="early_exit", threshold=0.0),
        "full_depth": partial(ours, model=plain, policy=ExitPolicy.full(plain.num_exits)),
    }
    orders = ("",) if len(prompts) == 1 else ("", "_together")
    for index, share, order in itertools.product(range(plain.num_exits), config.shares, orders):
        one = Forced(ExitPolicy.always(index, plain.num_exits).thresholds, share, bool(order))
        for kv in ("propagate",) if order else ("propagate", "recompute"):
            name = f"forced_{share}_at_{plain.depths[index]}{order}" + "_recompute" * (kv == "recompute")
            found[name] = partial(ours, model=plain, policy=one, kv=kv)
    if trained is not None:
        if trained.certificate is not None:
            found["certified"] = partial(ours, model=trained, policy=trained.policy)
            found["verified_certified"] = partial(ours, model=trained, policy=trained.policy, kv="verify")
        for index, depth in enumerate(trained.depths):
            always = ExitPolicy.always(index, trained.num_exits)
            found[f"verified_all_at_{depth}"] = partial(ours, model=trained, policy=always, kv="verify")
    if prompts.is_cuda:
        mine = [name for name in found if name.startswith(("full", "forced", "cert")) and "recompute" not in name]
        found |= {f"{name}_graphs": partial(found[name], cache_implementation="static") for name in mine}
    wanted = (*REFERENCES, *config.only) if config.only else ("",)
    return {name: engine for name, engine in found.items() if name.startswith(wanted)}


@cache
def economized(plain: EarlyExitModel, technique: str, threshold: float):
    """Returns the backbone as the peer `economize` runs it, untrained: leaving at L/3 where a score is above the
    threshold, or drafting there."""
    import economize
    from economize.techniques.dynamic_depth import CalmConfig
    from economize.techniques.early_exit import EarlyExitConfig

    calm = CalmConfig(confidence="classifier", min_layer=plain.depths[0], threshold=threshold)
    chosen = calm if technique == "calm" else EarlyExitConfig(exit_layer=plain.depths[0], head="shared")
    return economize.apply(plain.backbone, chosen)


def time_decoding(config: SpeedConfig, plain: EarlyExitModel, trained: EarlyExitModel | None, prompts: Tensor) -> dict:
    """Returns the section "decode" of one batch of prompts [rows, tokens]."""
    running, said, traces, refused = engines(config, plain, trained, prompts), {}, {}, []
    for name, engine in list(running.items()):
        try:  # untimed and greedy: what comes out now comes out in every round
            ids, traces[name] = engine(None)
            said[name] = ids[:, prompts.shape[1]:]
            if said[name].shape[1] != config.new_tokens:
                raise ValueError(f"gave {said[name].shape[1]} new tokens where {config.new_tokens} were wanted")
        except Exception as error:
            if name in REFERENCES:
                raise
            del running[name]
            refused.append({"engine": name, "error": f"{type(error).__name__}: {error}"})
            print(f"  {name} refused: {error}")

    runs, found = {name: partial(rates, engine) for name, engine in running.items()}, []
    timed = interleaved(runs, config.rounds, f"batch {len(prompts)}")
    timed = {name: dict(zip(("", "decode_"), zip(*pairs))) for name, pairs in timed.items()}
    for name in running:
        entry = {"engine": name, "tokens_as_hf": float((said[name] == said["hf_dynamic"]).float().mean())}
        for kind, values in timed[name].items():
            entry[f"{kind}tokens_per_second"] = spread(values)
            entry |= {f"{kind}over_{other}": spread(values, timed[other][kind]) for other in COMPARED if other in timed}
        if (trace := traces[name]) is not None:
            price = running[name].keywords["model"].costs.price(trace)
            ideal = {"bytes_batch_1": 1 / price.relative_bytes, "flops": 1 / price.relative_flops}
            realised = {kind: entry["decode_over_full_depth"]["median"] / value for kind, value in ideal.items()}
            entry |= {"exits": list(trace.exits), "shares": trace.shares, "ideal": ideal, "realised_of_ideal": realised}
        found.append(entry)
        print(f"  {name}:", *(f"{figure} {entry[figure]['median']:.4g}" for figure in SHOWN), sep="  ")
    equal = bool(torch.equal(said["full_depth"], said["hf_dynamic"]))
    print(f"batch {len(prompts)}: full depth gives the tokens of HF: {equal}")
    return {"batch": len(prompts), "full_depth_equals_hf": equal, "engines": found + refused}


if __name__ == "__main__":
    main(CONFIG)
