"""Differences between variations of a study, paired over the prompts that all were judged on, with standard errors.

    python eval/paired.py --config configs/study_pairs.yaml

Each pair is written `variation:base`. Figures are shares of all answer tokens; a prompt counts as a whole, since its
tokens are not independent. "no_harm" is judged by each one's own full depth, "original" by the model before training
(the same where the backbone was frozen), "oracle" is the price of leaving at the earliest exit that does no harm, as a
share of the full model's, over tokens after an answer's first; the backbone has the base's price on both sides, as if
adapters had been merged into it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from adaptive.checked import Checked, load_config


@dataclass
class PairedConfig(Checked):
    """What to compare.

    Attributes:
        study: folder that eval/study.py wrote
        pairs: `variation:base` each
        output: .json file to write
    """

    study: str
    pairs: list[str]
    output: str

    def problems(self) -> list[str]:
        """One line for each fault."""
        wrong = [pair for pair in self.pairs if pair.count(":") != 1]
        found = [f"`pairs` has {wrong}; each is `variation:base`"] if wrong else []
        names = {name for pair in self.pairs for name in pair.split(":")}
        missing = sorted(name for name in names if not (Path(self.study) / f"{name}.safetensors").exists())
        return found + ([f"`study` {self.study} has no {missing}; run eval/study.py first"] if missing else [])


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(PairedConfig)

import json

import numpy as np
from safetensors.numpy import load_file

from adaptive.costs import Costs
from adaptive.provenance import provenance
from adaptive.runs import write_json


def main(config: PairedConfig) -> dict:
    """Writes the differences, and returns them."""
    found = {}
    for pair in config.pairs:
        name, base = pair.split(":")
        shape = json.loads((Path(config.study) / f"{base}.json").read_text())["shape"]
        sides = [values(Path(config.study), side, shape) for side in (name, base)]
        rows = [side.pop("row") for side in sides]
        if not np.array_equal(*rows):
            raise ValueError(f"`pairs` has {pair}, which were not judged on the same answers")
        found[pair] = {
            figure: compared(*(side[figure] for side in sides), rows[0]) for figure in sides[0] if figure in sides[1]
        }
        print(f"{pair:34}", *(f"{figure} {text(values)}" for figure, values in found[pair].items()))
    write_json(Path(config.output), {"pairs": found, **provenance()})
    return found


def values(study: Path, name: str, shape: dict) -> dict[str, np.ndarray]:
    """Returns "row" [tokens], and what each token contributes to each figure; NaN where it takes no part."""
    record, found = json.loads((study / f"{name}.json").read_text()), load_file(study / f"{name}.safetensors")
    fine = found["regret"] <= record["tolerance"]
    depths, out = [exit["depth"] for exit in record["exits"]], {"row": found["row"]}
    out |= {f"no_harm {depth}": fine[:, index].astype(float) for index, depth in enumerate(depths)}
    costs = Costs(shape, record["exits"])
    contexts, back = np.unique(found["context"], return_inverse=True)
    priced = np.array([costs.by_exit(context) for context in contexts])[back]
    full = np.array([costs.by_exit(context, [False] * len(depths))[-1] for context in contexts])[back]
    first = np.where(fine.any(1), fine.argmax(1), len(depths))
    later = found["place"] > 0
    # A ratio of means: each token's price over the mean price of the full model.
    out["oracle"] = np.where(later, np.take_along_axis(priced, first[:, None], 1)[:, 0] / full[later].mean(), np.nan)
    frozen = record["made_with"]["config"].get("mode", "frozen") == "frozen"
    if not frozen and "original_regret" not in found:  # an earlier study's
        return out
    regret = np.pad(found["regret"], ((0, 0), (0, 1))) if frozen else found["original_regret"]
    for index, depth in enumerate([*depths, "full depth"]):
        out[f"original {depth}"] = (regret[:, index] <= record["tolerance"]).astype(float)
    out["original agrees"] = np.ones(len(regret)) if frozen else found["original_agrees"].astype(float)
    return out | {"original kl": np.zeros(len(regret)) if frozen else found["original_kl"].astype(float)}


def compared(values: np.ndarray, base: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Returns both means, and their difference with its standard error over prompts."""
    keep = ~np.isnan(values) & ~np.isnan(base)
    values, base, rows = values[keep], base[keep], np.unique(rows[keep], return_inverse=True)[1]
    difference = float((values - base).mean())
    # What a prompt adds to a difference of means over all tokens, long answers with more weight.
    added = np.bincount(rows, values - base - difference) / len(rows)
    error = float(np.sqrt(len(added) / (len(added) - 1) * (added**2).sum()))
    return {"mean": float(values.mean()), "base": float(base.mean()), "difference": difference, "error": error}


def text(values: dict) -> str:
    """Returns a figure in words."""
    return f"{values['mean']:.4f} ({values['difference']:+.4f} ± {values['error']:.4f})"


if __name__ == "__main__":
    main(CONFIG)
