"""Certify thresholds for a trained model, in free generation.

    python train/calibrate.py --run runs/demo --prompts runs/demo/text/prompts.json --risks 0.02,0.05,0.1
    python train/calibrate.py --run runs/mine --prompts my_prompts.jsonl --budgets 0.7,0.8 --harm sequence

Prompts are a .json file of {"select": [...], "certify": [...]} (as train/text.py writes; strings, lists of chat
messages or of token ids), or anything that `adaptive.data.read_texts` reads, of which a quarter selects. Of a
conversation, all counts up to what the user said last. The first target asked for becomes the model's policy once it
is certified. In the run's folder:

    certificate.json             of the first target; `EarlyExitModel.from_pretrained` takes it
    calibration/<target>.json    one certificate per target
    calibration.before/          of other weights, prompts or settings
    calibration/survey.safetensors   what the gates and heads said on the selection prompts
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from adaptive.checked import Checked, load_config


@dataclass
class CalibrationConfig(Checked):
    """What to certify.

    Attributes:
        run: folder of the trained model
        prompts: file or data set of prompts
        risks: largest expected harm per token, one certificate each; 0.02 if no target is given
        budgets: FLOPs relative to full depth, one certificate each
        delta: probability with which each certificate may be wrong
        harm: regret, disagreement or sequence
        tolerance: nats of regret that count as no harm
        bound: wsr, hb, or crc (which controls the mean only)
        max_new_tokens: length up to which answers are generated and vouched for
        batch_size: rows generated at once
        bolder: try up to two cheaper choices once a risk is certified, for as many more generations
        spare: certify a risk on so many times the prompts that zero harm would need; none = on all of them
        seed: of the order in which prompts enter the bound
    """

    run: str
    prompts: str
    risks: list[float] = field(default_factory=list)
    budgets: list[float] = field(default_factory=list)
    delta: float = 0.05
    harm: Literal["regret", "disagreement", "sequence"] = "regret"
    tolerance: float = 0.25
    bound: Literal["wsr", "hb", "crc"] = "wsr"
    max_new_tokens: int = 64
    batch_size: int = 32
    bolder: bool = False
    spare: int | None = None
    seed: int = 0

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = (
            self._below(2, "max_new_tokens")
            + self._below(1, "batch_size", "spare")
            + self._below(0, "seed", "tolerance")
        )
        found += [f"`risks` has {r}; each must be between 0 and 1" for r in self.risks if not 0 < r < 1]
        found += [f"`budgets` has {b}; each must be above 0" for b in self.budgets if b <= 0]
        if self.bolder and self.bound == "crc":
            found.append("`bolder` goes with the `bound` wsr or hb; crc controls the mean over draws, not each")
        if not 0 < self.delta < 1:
            found.append(f"`delta` is {self.delta}; it must be between 0 and 1")
        return found


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(CalibrationConfig)

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from adaptive import certify, survey
from adaptive.calibration import Certificate, needed_prompts, spend
from adaptive.data import digest, read_texts
from adaptive.model import EarlyExitModel
from adaptive.prompts import Prompt, encode, read_parts, until_last_question
from adaptive.runs import put, write_json
from adaptive.storage import model_digest, save_certificate


def main(config: CalibrationConfig) -> dict[str, Certificate]:
    """Writes and returns the certificates by target; those that were refused are named."""
    folder = Path(config.run) / "calibration"
    model = EarlyExitModel.from_pretrained(config.run).to("cuda" if torch.cuda.is_available() else "cpu")
    selection, certifying = read_prompts(config)
    folder.mkdir(parents=True, exist_ok=True)
    put_aside_other(folder, config, model_digest(model), digest(repr((selection, certifying)).encode()))
    found, certificates, refusals = None, {}, []
    for name, risk, budget in targets(config):
        path = folder / f"{name}.json"
        if not path.exists():
            found = found or surveyed(model, selection, config, folder / "survey.safetensors")
            prompts = certifying if risk is None or config.spare is None else certifying[: needed(config, risk)]
            try:
                certified(model, found, prompts, risk, budget, config).save(path)
            except certify.Refused as error:
                # The other targets may still be met, and hours may lie behind them.
                refusals.append(f"{name}: {error}")
                continue
        certificates[name] = Certificate.load(path)
    print("\n".join([*refusals, *([table(config, certificates)] if certificates else [])]))
    if not certificates:
        raise ValueError("no target was certified; see above")
    first = targets(config)[0][0]
    # The first one asked for, not the first one met: a choice after the fact would be wrong more often than delta.
    if first in certificates:
        model.certify(certificates[first])
        save_certificate(model, Path(config.run))
    return certificates


def certified(model, found, prompts, risk, budget, config: CalibrationConfig) -> Certificate:
    """Returns the certificate for one target."""
    return certify.calibrate(
        model,
        prompts,
        risk,
        config.delta,
        budget=budget,
        harm=config.harm,
        tolerance=config.tolerance,
        bound=config.bound,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        bolder=config.bolder,
        seed=config.seed,
        selection=found,
    )


def needed(config: CalibrationConfig, risk: float) -> int:
    """Returns `spare` times the number of prompts below which not even zero harm certifies a risk."""
    return config.spare * needed_prompts(risk, spend(config.delta, 2)[0], config.bound)


def targets(config: CalibrationConfig) -> list[tuple[str, float | None, float | None]]:
    """Returns (name, risk, budget) of every certificate asked for."""
    risks = config.risks if config.risks or config.budgets else [0.02]
    return [(f"risk-{risk:g}", risk, None) for risk in risks] + [
        (f"budget-{budget:g}", None, budget) for budget in config.budgets
    ]


def read_prompts(config: CalibrationConfig) -> tuple[list, list]:
    """Returns the prompts to select on and, disjoint from them, those to certify on."""
    if config.prompts.endswith(".json"):
        selection, certifying = read_parts(config.prompts, "select", "certify")
    else:
        found = questions(config.prompts)
        order = np.random.default_rng(config.seed).permutation(len(found))
        selection = [found[i] for i in order[: len(found) // 4]]
        certifying = [found[i] for i in order[len(found) // 4 :]]
    if both := {str(p) for p in selection} & {str(p) for p in certifying}:
        raise ValueError(
            f"{len(both)} prompts are both in `select` and in `certify` of {config.prompts}, such as "
            f"{sorted(both)[0][:60]!r}; what chose the thresholds cannot certify them"
        )
    return selection, certifying


def questions(source: str) -> list[Prompt]:
    """Returns the different prompts among texts and conversations, in their order."""
    conversations: dict[str, Prompt] = {}

    def render(messages: list[dict[str, str]]) -> str:
        # Texts are all that is read: a conversation passes as its JSON, and is itself again behind it.
        prompt = until_last_question(messages)
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        conversations[text] = prompt
        return text

    return [conversations.get(text, text) for text in dict.fromkeys(read_texts(source, render))]


def put_aside_other(folder: Path, config: CalibrationConfig, weights: str, prompts: str) -> None:
    """Puts aside what an earlier calibration of other weights, other prompts or with other settings left."""
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("run", "prompts", "risks", "budgets")
    }
    record, path = settings | {"model_digest": weights, "prompts_digest": prompts}, folder / "settings.json"
    if not path.exists() or json.loads(path.read_text()) != record:
        if any(folder.iterdir()):
            shutil.rmtree(folder.with_name("calibration.before"), ignore_errors=True)
            folder.rename(folder.with_name("calibration.before"))
            folder.mkdir()
        write_json(path, record)


def surveyed(model: EarlyExitModel, prompts: list, config: CalibrationConfig, path: Path) -> survey.Survey:
    """Returns the survey of the selection prompts, from its file if it was made before."""
    try:
        arrays = load_file(path)
    except (FileNotFoundError, SafetensorError):
        ids = encode(prompts, certify.load_tokenizer(model))
        found = survey.survey(model, ids, config.max_new_tokens, config.batch_size)
        # safetensors writes a view's memory as it lies, strided or not.
        arrays = {name: np.array(value, order="C") for name, value in vars(found).items()}
        put(path, lambda temporary: save_file(arrays, temporary))
    return survey.Survey(**arrays | {"full_cost": float(arrays["full_cost"])})


def table(config: CalibrationConfig, certificates: dict[str, Certificate]) -> str:
    """Returns the certificates as a Markdown table."""
    lines = [
        f"| target | certified {config.harm} | mean harm | prompts | thresholds | relative FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for name, c in certificates.items():
        cuts = " / ".join("never" if t == float("inf") else f"{t:.3f}" for t in c.thresholds)
        lines.append(f"| {name} | {c.certified:.4f} | {c.mean:.4f} | {c.n} | {cuts} | {1 - c.saved:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(CONFIG)
