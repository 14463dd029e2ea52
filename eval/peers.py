"""The same contest for us and for a peer: `economize` with CALM, a shared linear classifier over untrained exits.

    python eval/peers.py --run runs/demo --prompts runs/demo/text/prompts.json --output results/peers.json

Same base, same training tokens, same prompts, same harm (regret of each token against the full model's best, in free
greedy generation), same epsilon and delta, same number of operating points to choose from. Each side chooses with its
own bound: economize by fixed-sequence testing with Hoeffding-Bentkus from its most careful threshold down, we by the
same sequence with WSR over the points that a survey of the selection prompts suggests. Reported per side: share of
layers executed, FLOPs by our meter, quality, violations over re-splits of the certification prompts, seconds of
calibration, tokens/s. Its depths are counted layer by layer as it runs (its `CostModel` does not see exits).
The peer's training is kept beside OUTPUT, in a folder that ends in .peer. Needs the extra [peers].
"""

import sys
from dataclasses import dataclass, field

from adaptive.checked import Checked, load_config


@dataclass
class PeersConfig(Checked):
    """How the contest is held.

    Attributes:
        run: folder of our trained exits
        prompts: .json file with the parts select, certify and report
        output: file for the figures
        data: rows that the peer trains on; empty = those of the run
        epsilon: largest mean harm per token
        delta: probability with which that may fail
        tolerance: regret in nats up to which a token does no harm
        max_new_tokens: length of the answers
        certify: certification prompts used
        points: operating points that each side may choose from
        steps: the peer's training steps; none = as many tokens as the run saw
        resplits: of the certification prompts
        speed_prompts: prompts that are timed, each side in turn
        seed: of the re-splits
    """

    run: str
    prompts: str
    output: str
    data: list[str] = field(default_factory=list)
    epsilon: float = 0.05
    delta: float = 0.05
    tolerance: float = 0.25
    max_new_tokens: int = 32
    certify: int = 100
    points: int = 19
    steps: int | None = None
    resplits: int = 50
    speed_prompts: int = 8
    seed: int = 0

    def problems(self) -> list[str]:
        """One line for each fault."""
        return self._below(2, "max_new_tokens", "points") + self._below(4, "certify") + self._below(1, "resplits")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(PeersConfig)

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import economize
import numpy as np
import torch
from economize.techniques.dynamic_depth import CalmConfig
from economize.techniques.dynamic_depth.base import DepthMeter
from economize.train import fit
from tqdm import tqdm

from adaptive import certify, outcomes, ranking, rows, survey
from adaptive.calibration import BOUNDS, rouge_l
from adaptive.config import ExitConfig
from adaptive.model import EarlyExitModel
from adaptive.policy import ExitPolicy, Trace
from adaptive.prompts import encode
from adaptive.provenance import provenance
from adaptive.runs import write_json

BATCHES = (1, 8)


@dataclass
class Side:
    """One contestant.

    Attributes:
        name: of it.
        points: its operating points, the most careful first.
        answer: (prompts, point) -> answers and trace.
        speak: (prompts, point) -> number of tokens, all prompts in one batch, for timing.
        meter: a model whose costs price its traces.
        bound: key of `calibration.BOUNDS` that it chooses with.
        training: seconds.
        preparing: seconds of calibration before any certification prompt is answered.
    """

    name: str
    points: list
    answer: Callable
    speak: Callable
    meter: EarlyExitModel
    bound: str
    training: float | None
    preparing: float


def main(config: PeersConfig) -> dict:
    """Holds the contest; prints and writes the figures."""
    model, record = EarlyExitModel.from_pretrained(config.run), Path(config.run) / "run.json"
    settings = json.loads(record.read_text()) if record.exists() else {}
    parts, tokenizer = json.loads(Path(config.prompts).read_text()), certify.load_tokenizer(model)
    select, proof, report = (encode(parts[name], tokenizer) for name in ("select", "certify", "report"))
    proof = certify.distinct(proof)[: config.certify]
    sides = [ours(model, select, config), economized(model, settings, config)]
    full, _ = outcomes.answer(model, report, ExitPolicy.full(model.num_exits), config.max_new_tokens)
    document = {"config": dataclasses.asdict(config), "sides": {}, "provenance": provenance("economize")}
    picked = {}
    for side in sides:
        picked[side.name], document["sides"][side.name] = judged(side, model, proof, report, full, config)
    for name, speed in timed(sides, picked, report, config).items():
        document["sides"][name]["tokens_per_second"] = speed
    write_json(Path(config.output), document)
    print(table(document))
    return document


def ours(model: EarlyExitModel, select: list, config: PeersConfig) -> Side:
    """Returns our side: points on the frontier that one full-depth pass over the selection prompts gives."""
    begun = time.perf_counter()
    found = survey.survey(model, select, config.max_new_tokens)
    arrays = found.scores, found.harms("regret", config.tolerance), found.costs
    frontier = ranking.frontier(*arrays, found.full_cost, found.rows)
    # Evenly in predicted harm up to twice what is allowed: nobody would choose beyond.
    wanted = np.linspace(0, 2 * config.epsilon, config.points)
    points = [min(frontier, key=lambda point: abs(point.harm - harm)).thresholds for harm in wanted]
    points = [ExitPolicy(p) for p in dict.fromkeys(tuple(map(float, point)) for point in points)]
    seconds = time.perf_counter() - begun

    def answer(prompts: list, point: ExitPolicy) -> tuple[list, Trace]:
        return outcomes.answer(model, prompts, point, config.max_new_tokens)

    def speak(prompts: list, point: ExitPolicy) -> int:
        return sum(map(len, answer(prompts, point)[0]))

    return Side("adaptive", points, answer, speak, model, "wsr", None, seconds)


def economized(model: EarlyExitModel, settings: dict, config: PeersConfig) -> Side:
    """Returns the peer's side, its classifier trained on the same tokens as our exits."""
    data = rows.load_rows(config.data or settings["data"], settings.get("model", ""), 256)["input_ids"].long()
    batch = settings.get("batch_size", 4)
    peer = economize.apply(copy.deepcopy(model.view.inner), CalmConfig(confidence="classifier", threshold=0.9))
    # Every step asks for the vocabulary at every depth, which takes long on a CPU: an interrupted contest goes on here.
    kept = Path(config.output).with_suffix(".peer")
    steps = config.steps or settings.get("steps", 100)
    # Its own warm-up of 100 steps would never end in a run as short as the demo's.
    settings = {"steps": steps, "batch_size": batch, "seed": config.seed, "warmup_steps": min(100, steps // 10)}
    done = fit(peer, data, objective="calm", output_dir=kept, resume=True, save_every=6, **settings)
    training = done.history[-1]["time"]
    peer.eval()
    layers = model.view.num_layers
    # Every depth is an exit through the model's own norm and head, and asks a linear gate on the way.
    meter = EarlyExitModel.from_backbone(model.backbone, ExitConfig(list(range(1, layers)), head="norm"))
    points = [round(float(value), 4) for value in np.linspace(0.95, 0.05, config.points)]

    def threshold(point: float) -> None:
        technique = peer.techniques["calm"]
        technique.config = dataclasses.replace(technique.config, threshold=point)

    def answer(prompts: list, point: float) -> tuple[list, Trace]:
        threshold(point)
        stop, found, traces = model.generation_config.eos_token_id, [], []
        for prompt in prompts:
            with counted() as depths:
                said = peer.decode(torch.tensor(prompt), config.max_new_tokens, stop=stop).tokens.tolist()
            found.append(said)
            traces.append(trace(len(prompt), len(said), depths, layers))
        return found, Trace.join(traces)

    def speak(prompts: list, point: float) -> int:
        threshold(point)
        found = peer.decode_batch([torch.tensor(prompt) for prompt in prompts], config.max_new_tokens)
        return sum(len(one.tokens) for one in found)

    return Side("economize", points, answer, speak, meter, "hb", training, 0.0)


class counted:
    """Collects, while open, the depth of every token that economize decodes at batch 1, one pass after the other."""

    def __enter__(self) -> list[int]:
        self.depths: list[int] = []
        self.record = record = DepthMeter.record

        def listen(meter, index, entered, ran, filled, phase=None):
            if index == 1:
                self.depths.append(0)
            self.depths[-1] += int(ran > 0)
            return record(meter, index, entered, ran, filled, phase)

        DepthMeter.record = listen
        return self.depths

    def __exit__(self, *_) -> None:
        DepthMeter.record = self.record


def trace(prompt: int, tokens: int, depths: list[int], layers: int) -> Trace:
    """Returns the trace of one answer; what it does not count, the prompt and the first token, ran all layers."""
    depths = np.array([layers] * (tokens - len(depths)) + depths[:tokens])[None]
    count = layers - 1
    asked = np.arange(1, layers) <= depths[..., None]
    asked[:, 0] = False
    headed = (depths[..., None] == np.arange(1, layers)) & (depths < layers)[..., None]
    context = prompt + np.arange(tokens)[None]
    taken = np.where(depths < layers, depths - 1, count)
    scores = np.where(asked, 0.5, np.nan)
    none = np.zeros(headed.shape, int)
    return Trace(tuple(range(1, layers)), layers, taken, scores, context, headed, none, np.array([prompt]))


def harms(model: EarlyExitModel, prompts: list, answers: list, config: PeersConfig) -> np.ndarray:
    """Returns the mean harm [prompts] of the tokens of each answer, judged by the full model."""
    regret, _ = outcomes.judge(model, prompts, answers)
    return np.nanmean(np.where(np.isnan(regret), np.nan, regret > config.tolerance), axis=1)


def chosen(side: Side, losses: np.ndarray, config: PeersConfig, generator: np.random.Generator) -> int | None:
    """Returns the last point of the sequence up to which every one is certified (Angelopoulos et al. 2021, "Learn then
    test", section 3); None if the first is not.

    Args:
        losses: [points, prompts].
    """
    best = None
    for index, line in enumerate(losses):
        if BOUNDS[side.bound](generator.permutation(line), config.delta) > config.epsilon:
            break
        best = index
    return best


def judged(side: Side, model, proof: list, report: list, full: list, config: PeersConfig) -> tuple:
    """Returns the point chosen on all certification prompts (None: full depth), and the side's figures."""
    generator, losses, shares = np.random.default_rng(config.seed), [], []
    begun = time.perf_counter()
    for point in tqdm(side.points, desc=side.name, unit="point"):
        answers, found = side.answer(proof, point)
        losses.append(harms(model, proof, answers, config))
        shares.append(found.mean_depth / found.layers)
        # The sequence ends at the first point that fails; what harms twice as much as allowed fails on any half, too.
        if losses[-1].mean() > 2 * config.epsilon:
            break
    losses, seconds = np.array(losses), time.perf_counter() - begun
    broken, saved, half = 0, [], len(proof) // 2
    for _ in range(config.resplits):
        order = generator.permutation(len(proof))
        index = chosen(side, losses[:, order[:half]], config, generator)
        broken += index is not None and losses[index, order[half:]].mean() > config.epsilon
        saved.append(0.0 if index is None else 1 - shares[index])
    best = chosen(side, losses, config, generator)
    figures = {
        "training_seconds": side.training,
        "calibration_seconds": side.preparing + seconds,
        "violations": broken / config.resplits,
        "layers_saved_over_resplits": float(np.mean(saved)),
        "certified_point": None if best is None else str(side.points[best]),
        "executed_layer_share": 1.0,
        "relative_flops": 1.0,
        "harm": 0.0,
        "rouge_l": 1.0,
    }
    if best is not None:
        answers, found = side.answer(report, side.points[best])
        figures["executed_layer_share"] = found.mean_depth / found.layers
        figures["relative_flops"] = side.meter.costs.price(found).relative_flops
        figures["harm"] = float(harms(model, report, answers, config).mean())
        figures["rouge_l"] = float(np.mean([rouge_l(*pair) for pair in zip(answers, full, strict=True)]))
    return best, figures


def timed(sides: list[Side], picked: dict, report: list, config: PeersConfig) -> dict:
    """Returns tokens/s by side and batch size, prefill included: [median, least, most] of interleaved rounds."""
    out: dict = {side.name: {} for side in sides}
    generator = np.random.default_rng(0)
    for size in BATCHES:
        prompts = report[: max(size, config.speed_prompts)]
        rates: dict = {side.name: [] for side in sides}
        for start in range(0, len(prompts) - size + 1, size):
            for side in (sides[index] for index in generator.permutation(len(sides))):
                point = side.points[picked[side.name] if picked[side.name] is not None else 0]
                begun = time.perf_counter()
                tokens = side.speak(prompts[start : start + size], point)
                rates[side.name].append(tokens / (time.perf_counter() - begun))
        for name, found in rates.items():
            out[name][str(size)] = [float(of(found)) for of in (np.median, np.min, np.max)]
    return out


def table(document: dict) -> str:
    """Returns the figures as a Markdown table, one column per side."""
    sides = document["sides"]
    lines = [["", *sides], ["---", *["---:"] * len(sides)]]
    for name in next(iter(sides.values())):
        values = [side[name] for side in sides.values()]
        shown = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
        lines.append([name.replace("_", " "), *shown])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main(CONFIG)
