"""Times an exported folder's policies on prompts, interleaved: full depth, and what it certified.

    python eval/folder_speed.py --folder out --prompts runs/demo/text/prompts.json --threads 2 --output results/x.json

Every round answers one prompt greedily by a fixed number of tokens under each policy, in another order each round.
The speed-up of a policy is the full depth's seconds per token over its own, prefill left out; reported are the ratio of
the sums over all rounds, and its 90 % interval from resampling rounds. The ideal is what its trace costs in FLOPs.
"""

import sys
from dataclasses import asdict, dataclass, field

from adaptive.checked import Checked, load_config


@dataclass
class FolderSpeedConfig(Checked):
    """What to time.

    Attributes:
        folder: exported folder
        prompts: .json file of {"report": [...]}: strings
        policies: that the folder knows: full, certified, budget=SHARE
        new_tokens: tokens of each answer
        rounds: prompts answered; none = all there are
        threads: that compute; none = the cores there are
        output: JSON file of results; none = only the last line of stdout
    """

    folder: str
    prompts: str
    policies: list[str] = field(default_factory=lambda: ["full", "certified"])
    new_tokens: int = 64
    rounds: int | None = None
    threads: int | None = None
    output: str | None = None

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = [] if "full" in self.policies else ["`policies` lacks full, which the others are compared with"]
        return found + self._below(2, "new_tokens")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(FolderSpeedConfig)

import json
import time
from pathlib import Path

import numpy as np

from adaptive.costs import Costs
from adaptive.policy import Trace
from adaptive.provenance import provenance
from adaptive.runs import write_json
from adaptive.runtime import Runtime, Token
from adaptive.session import Session


def encoded(runtime: Runtime, prompt: str) -> list[int]:
    """Returns what a user says as ids, as a chat message where the model chats."""
    if runtime.manifest["chat"] is None:
        return runtime.texts.encode(prompt)
    return runtime.texts.chat([{"role": "user", "content": prompt}])


def timed(runtime: Runtime, ids: list[int], policy, count: int) -> tuple[float, object]:
    """Returns (seconds per token after the first one, trace) of an answer of `count` tokens, ends of text ignored."""
    session, tokens, token = Session(runtime, len(ids) + count), [], None
    session.prefill(ids)
    for number in range(count):
        step = session.step(policy, token)
        token = step.pick()
        tokens.append(Token(token, "", 0, 0.0, step))
        if number == 0:
            began = time.perf_counter()
    return (time.perf_counter() - began) / (count - 1), runtime.trace(tokens, len(ids))


def main(config: FolderSpeedConfig) -> dict:
    """Times, prints and writes; returns the document."""
    runtime = Runtime.load(config.folder, config.threads)
    prompts = json.loads(Path(config.prompts).read_text())["report"][: config.rounds]
    costs = Costs(runtime.manifest["costs"]["shape"], runtime.manifest["costs"]["exits"])
    seconds, traces = {name: [] for name in config.policies}, {name: [] for name in config.policies}
    timed(runtime, encoded(runtime, prompts[0]), runtime.policy("full"), 16)  # what is slow only once
    generator = np.random.default_rng(0)
    for prompt in prompts:
        ids = encoded(runtime, prompt)
        for name in generator.permutation(config.policies).tolist():
            took, trace = timed(runtime, ids, runtime.policy(name), config.new_tokens)
            seconds[name].append(took)
            traces[name].append(trace)
    full, results = np.array(seconds["full"]), []
    for name in config.policies:
        own, count = np.array(seconds[name]), len(prompts)
        drawn = generator.integers(0, count, (1000, count))
        low, high = np.quantile(full[drawn].sum(1) / own[drawn].sum(1), [0.05, 0.95])
        ideal = 1 / costs.price(Trace.join(traces[name])).relative_flops
        speedup = float(full.sum() / own.sum())
        results.append(
            {"policy": name, "tokens_per_second": round(float(1 / np.median(own)), 2), "speedup": round(speedup, 3),
             "interval": [round(float(low), 3), round(float(high), 3)], "ideal": round(float(ideal), 3),
             "of_ideal": round(speedup / float(ideal), 3)}
        )  # fmt: skip
        print(results[-1], flush=True)
    made = provenance("onnxruntime")
    made["machine"]["threads"] = config.threads or made["machine"]["cores"]  # of the folder's graphs, not torch's
    document = {
        "provenance": made,
        "settings": asdict(config) | {"precision": runtime.manifest["precision"]},
        "results": results,
    }
    if config.output:
        write_json(Path(config.output), document)
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main(CONFIG)
