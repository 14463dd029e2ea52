"""Check a certificate again, on prompts that nobody has seen, of the same kind or another: harm in free generation
against the certified bound, and what the answers are like beside those of the full depth.

    python train/text.py --output runs/new --seed 1 --train 1 --select 1 --certify 1 --report 200
    python eval/recheck.py --run runs/demo --prompts runs/new/prompts.json --output results/recheck.json

Prompts that chose or certified (`seen`) are left out. The last line is one JSON document.
"""

import sys
from dataclasses import dataclass

from adaptive.checked import Checked, load_config


@dataclass
class RecheckConfig(Checked):
    """What to check, and on what.

    Attributes:
        run: folder of the certified model
        prompts: .json file whose part "report" holds the new prompts
        seen: .json file of the prompts that chose and certified, if there may be common ones
        batch_size: rows generated at once
        output: file to write the figures to; none = only print them
    """

    run: str
    prompts: str
    seen: str | None = None
    batch_size: int = 64
    output: str | None = None

    def problems(self) -> list[str]:
        """One line for each fault."""
        return self._below(1, "batch_size")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(RecheckConfig)

import json
from pathlib import Path

import numpy as np
import torch

from adaptive import certify, survey
from adaptive.calibration import BY_TOKEN, rouge_l
from adaptive.model import EarlyExitModel
from adaptive.outcomes import observe
from adaptive.policy import ExitPolicy
from adaptive.prompts import encode, read_parts
from adaptive.provenance import provenance
from adaptive.runs import write_json


def main(config: RecheckConfig) -> dict:
    """Prints and returns the figures.

    Raises:
        ValueError: the run has no certificate, or one of whole answers; fewer than two new prompts.
    """
    model = EarlyExitModel.from_pretrained(config.run).to("cuda" if torch.cuda.is_available() else "cpu")
    certificate = model.certificate
    if certificate is None or certificate.harm not in BY_TOKEN:
        raise ValueError(f"{config.run} has no certificate of harm per token; run train/calibrate.py with such a harm")
    seen = json.loads(Path(config.seen).read_text()) if config.seen else {}
    known = {str(prompt) for part in seen.values() for prompt in part}
    prompts = [p for p in read_parts(config.prompts, "report")[0] if str(p) not in known]
    if len(prompts) < 2:
        raise ValueError(
            f"`report` of {config.prompts} has {len(prompts) or 'no'} prompts that are not in `seen`; give at least 2, "
            "since one harm has no standard error"
        )
    ids = encode(prompts, certify.load_tokenizer(model))
    policies = ExitPolicy.full(model.num_exits), ExitPolicy(tuple(certificate.thresholds))
    full, outcome = (observe(model, ids, policy, certificate.max_new_tokens, config.batch_size) for policy in policies)
    harms = survey.loss_per_prompt(certificate.harm, certificate.tolerance or 0.0, outcome, None)
    price = model.costs.price(outcome.trace)
    document = {
        "run": config.run,
        "prompts": len(ids),
        "harm": float(harms.mean()),
        "standard_error": float(harms.std(ddof=1) / len(harms) ** 0.5),
        "epsilon": certificate.epsilon,
        "certified": certificate.certified,
        "mean_depth": outcome.trace.mean_depth,
        "relative_flops": price.relative_flops,
        "saved": price.saved,
        "rouge_l": float(np.mean([rouge_l(*pair) for pair in zip(outcome.answers, full.answers, strict=True)])),
        "relative_perplexity": float(np.exp(np.nanmean(outcome.nll) - np.nanmean(full.nll))),
        **provenance(),
    }
    held = document["harm"] <= certificate.certified
    print(f"harm {document['harm']:.4f} ± {document['standard_error']:.4f} on {len(ids)} new prompts, certified "
          f"{certificate.certified:.4f}: {'holds' if held else 'does NOT hold on these'}")  # fmt: skip
    if config.output:
        write_json(Path(config.output), document)
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main(CONFIG)
