"""What scoring through the exits takes beside lm-eval's plain `hf`: seconds per task, for one policy and for all.

    python eval/overhead.py --model runs/demo --include_path configs/tasks --tasks piqa_rows --limit 120 \\
        --policy risk=0.05 full exit=22 exit=26 --output results/overhead.json

Timed are whole evaluations (tokenizing, scoring, metrics), one after the other in one process, the model loaded before;
so are a few documents first, that warm everything up. Tasks are added to those that OUTPUT has already, and all of them
together are its "total". A task's first batch of texts is generated under each policy alone, for tokens/s: that counts,
too.
"""

import sys
from dataclasses import dataclass

from adaptive.checked import Checked, load_config


@dataclass
class OverheadConfig(Checked):
    """What to time.

    Attributes:
        model: folder of a model with exits
        tasks: names of tasks
        policy: the first is timed alone, then all together
        output: file for the figures
        include_path: folder of further tasks, as YAML
        limit: documents per task
        batch_size: rows at once
        max_length: longest context in tokens
    """

    model: str
    tasks: list[str]
    policy: list[str]
    output: str
    include_path: str | None = None
    limit: int = 120
    batch_size: int = 8
    max_length: int = 2048

    def problems(self) -> list[str]:
        """One line for each fault."""
        return self._below(1, "limit", "batch_size", "max_length")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(OverheadConfig)

import json
import time
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from adaptive.certify import load_tokenizer
from adaptive.harness import AdaptiveLM, policy_names
from adaptive.model import EarlyExitModel
from adaptive.provenance import provenance
from adaptive.runs import write_json


def main(config: OverheadConfig) -> dict:
    """Prints and writes the seconds of each task; returns all that the file holds."""
    model = EarlyExitModel.from_pretrained(config.model)
    settings = {"batch_size": config.batch_size, "max_length": config.max_length}
    plain = HFLM(model.view.inner, backend="causal", tokenizer=load_tokenizer(model), **settings)
    manager = TaskManager(include_path=config.include_path, include_defaults=config.include_path is None)
    path, names = Path(config.output), policy_names(config.policy)
    document = json.loads(path.read_text()) if path.exists() else {"tasks": {}}

    def seconds(lm, task: str, limit: int) -> float:
        begun = time.perf_counter()
        for name in list(getattr(lm, "policies", ["hf"])):
            lm.policy = name
            lm_eval.simple_evaluate(lm, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0)
        return time.perf_counter() - begun

    for task in config.tasks:
        taken = {}
        for name, policies in (("hf", None), ("one", names[:1]), ("all", names)):
            for limit in (2, config.limit):
                lm = AdaptiveLM(model, ";".join(policies), folder=config.model, **settings) if policies else plain
                taken[name] = seconds(lm, task, limit)
        document["tasks"][task] = {
            **compared(taken),
            "documents": config.limit,
            "policies": names,
            "batch_size": config.batch_size,
            "provenance": provenance("lm_eval"),
        }
        every = [found["seconds"] for found in document["tasks"].values()]
        document["total"] = compared({name: sum(seconds[name] for seconds in every) for name in taken})
        write_json(path, document)
        for title, found in ((task, document["tasks"][task]), (f"all {len(every)} tasks", document["total"])):
            one, together = found["over_hf"].values()
            print(f"{title}: hf {found['seconds']['hf']:.1f} s, one policy {one:.2f} x, {len(names)} policies "
                  f"{together:.2f} x")  # fmt: skip
    return document


def compared(taken: dict[str, float]) -> dict:
    """Returns the seconds, and how many times those of plain `hf` the others are."""
    return {"seconds": taken, "over_hf": {name: taken[name] / taken["hf"] for name in ("one", "all")}}


if __name__ == "__main__":
    main(CONFIG)
