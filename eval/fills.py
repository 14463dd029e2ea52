"""What becomes of K/V that skipped blocks never made: projected, fitted or recomputed, under the same thresholds.

    python eval/fills.py --run runs/best --prompts runs/best/prompts/prompts.json --output results/fills.json

For every exit and every block behind it: the squared error of the K/V of the full model's own answers, as a share of
their variance. Then all report prompts are answered freely with the certificate's thresholds, or those given: harm by
where a token left, and FLOPs. A picture of the errors is written beside OUTPUT.
"""

import sys
from dataclasses import dataclass

from adaptive.checked import Checked, load_config


@dataclass
class FillsConfig(Checked):
    """What to compare, and on what.

    Attributes:
        run: folder of the trained model
        prompts: .json file whose part "report" is answered
        output: file for the figures
        thresholds: one per exit; none = those of the run's certificate
        max_new_tokens: length of answers
        tolerance: nats of regret that count as no harm
        batch_size: rows generated at once
    """

    run: str
    prompts: str
    output: str
    thresholds: list[float] | None = None
    max_new_tokens: int = 32
    tolerance: float = 0.25
    batch_size: int = 32

    def problems(self) -> list[str]:
        """One line for each fault."""
        return self._below(1, "batch_size") + self._below(2, "max_new_tokens") + self._below(0, "tolerance")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(FillsConfig)

import copy
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from adaptive import outcomes
from adaptive.certify import load_tokenizer
from adaptive.fills import Fill
from adaptive.kv import KV
from adaptive.model import EarlyExitModel
from adaptive.policy import ExitPolicy
from adaptive.prompts import encode, left_pad
from adaptive.provenance import provenance
from adaptive.runs import put, write_json


def main(config: FillsConfig) -> dict:
    """Prints, writes and returns the figures.

    Raises:
        ValueError: a run without fitted fills, or without a certificate where no thresholds are given.
    """
    model = EarlyExitModel.from_pretrained(config.run).to("cuda" if torch.cuda.is_available() else "cpu")
    if not any(fill is not None for fill in model.exits.fills):
        raise ValueError(f"{config.run} has no fitted fills; train it anew with `exits.fill`: fitted")
    if config.thresholds is None and model.certificate is None:
        raise ValueError(f"{config.run} has no certificate; give `thresholds`, one per exit of {model.depths}")
    policy = model.policy if config.thresholds is None else ExitPolicy(tuple(config.thresholds))
    prompts = encode(json.loads(Path(config.prompts).read_text())["report"], load_tokenizer(model))
    answers = outcomes.answer(model, prompts, ExitPolicy.full(model.num_exits), config.max_new_tokens)[0]
    fitted = model.exits.fills
    projected = copy.deepcopy(fitted)
    for index, fill in enumerate(fitted):
        if fill is not None:
            projected[index] = Fill(model.view.projections, fill.depth)
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    document = {
        "depths": model.depths,
        "thresholds": list(policy.thresholds),
        "max_new_tokens": config.max_new_tokens,
        "tolerance": config.tolerance,
        "prompts": len(prompts),
        "error": {"projected": errors(model, texts, projected), "fitted": errors(model, texts, fitted)},
        "generation": {},
    }
    for name, fills, kv in (("projected", projected, "propagate"), ("fitted", fitted, "propagate"),
                            ("recomputed", fitted, "recompute")):  # fmt: skip
        model.exits.fills = fills
        document["generation"][name] = found = generation(model, prompts, policy, kv, config)
        print(f"{name}: harm {found['harm']:.4f} ± {found['standard_error']:.4f} at {found['relative_flops']:.3f} of "
              f"the FLOPs; by depth left at {found['harm_by_depth']}")  # fmt: skip
    document["provenance"] = provenance()
    write_json(Path(config.output), document)
    put(Path(config.output).with_suffix(".png"), lambda path: draw(document, path))
    return document


@torch.no_grad()
def errors(model, texts: list[list[int]], fills) -> dict[str, list[float]]:
    """Returns, by exit depth, the mean squared error of K and V of each deeper block over their variance."""
    view, sums = model.view, {str(fill.depth): 0.0 for fill in fills if fill is not None}
    for text in tqdm(texts, desc="K/V", leave=False):
        ids, true = torch.tensor([text], device=model.device), KV(view.num_layers, len(text), 1)
        hidden, calls = view.start(ids, None, None, true)
        states, depth = [], 0
        for next_depth in (*model.depths, view.num_layers):
            hidden, depth = view.run(hidden, calls, depth, next_depth), next_depth
            states.append(hidden)
        for fill, state in zip(fills, states):
            if fill is not None:
                made = KV(view.num_layers, len(text), 1)
                view.fill(state, calls, fill.depth, view.num_layers, made, fill)
                sums[str(fill.depth)] += np.array([_parts(made, true, b) for b in range(fill.depth, view.num_layers)])
    # The variance over all texts: mean of squares less square of means, of each number stored for a token.
    return {depth: _ratio(found) for depth, found in sums.items()}


def _parts(made: KV, true: KV, block: int) -> list:
    """Returns sums over tokens [4, numbers]: squared error, square, value, and 1."""
    found, wanted = (torch.cat([kv.keys[block], kv.values[block]], -1)[0].transpose(0, 1).flatten(1).double() for kv in
                     (made, true))  # fmt: skip
    parts = ((found - wanted).square(), wanted.square(), wanted, torch.ones_like(wanted))
    return [part.sum(0).cpu().numpy() for part in parts]


def _ratio(sums: np.ndarray) -> list[float]:
    error, square, value, count = np.moveaxis(sums, 1, 0)
    variance = square / count - (value / count) ** 2
    return [round(float(e), 4) for e in (error / count).mean(-1) / variance.mean(-1)]


def generation(model, prompts: list[list[int]], policy: ExitPolicy, kv: str, config: FillsConfig) -> dict:
    """Returns what free generation does: harm per prompt, FLOPs, and share and harm by the depth tokens left at."""
    harms, costs, stops = [], [], (*model.depths, "full")
    counts = {str(stop): [0, 0] for stop in stops}
    for start in tqdm(range(0, len(prompts), config.batch_size), desc=kv, leave=False):
        some = prompts[start : start + config.batch_size]
        ids, mask = left_pad(some, 0, model.device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=config.max_new_tokens, do_sample=False, policy=policy,
            kv=kv, pad_token_id=0, return_dict_in_generate=True,
        )  # fmt: skip
        trace, price = out.trace, model.costs.price(out.trace)
        lengths = trace.valid.sum(1)
        said = [row[:n].tolist() for row, n in zip(out.sequences[:, ids.shape[1] :], lengths, strict=True)]
        regret = outcomes.judge(model, some, said)[0]
        harmed = np.where(np.isnan(regret), np.nan, regret > config.tolerance)
        harms += np.nanmean(harmed, axis=1).tolist()
        costs.append((int(price.flops.sum()), int(price.full_flops.sum())))
        for index, stop in enumerate(stops):
            here = (trace.taken[:, : regret.shape[1]] == index) & ~np.isnan(regret)
            counts[str(stop)][0] += int(here.sum())
            counts[str(stop)][1] += int(harmed[here].sum())
    total = sum(count for count, _ in counts.values())
    return {
        "harm": float(np.mean(harms)),
        "standard_error": float(np.std(harms, ddof=1) / len(harms) ** 0.5),
        "relative_flops": sum(ours for ours, _ in costs) / sum(full for _, full in costs),
        "share_by_depth": {stop: round(count / total, 4) for stop, (count, _) in counts.items()},
        "harm_by_depth": {stop: round(bad / count, 4) for stop, (count, bad) in counts.items() if count},
    }


def draw(document: dict, path: Path) -> None:
    """Writes the picture: error of the K/V by block, a line per exit, projected and fitted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, depth in enumerate(document["error"]["fitted"]):
        for kind, style in (("projected", "--"), ("fitted", "-")):
            values = document["error"][kind][depth]
            blocks = np.arange(int(depth), int(depth) + len(values))
            axes.plot(blocks, values, style, marker=".", color=f"C{number}", label=f"left at {depth}, {kind}")
    axes.axhline(1, color="grey", lw=0.8)
    axes.set(xlabel="skipped block", ylabel="squared error of K/V / their variance", title="K/V of skipped blocks")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main(CONFIG)
