"""lm-evaluation-harness through the exits: scores and costs of one model under any number of policies.

    python eval/harness.py --model runs/demo --policy full certified exit=22 thresholds=0.9,0.9,inf \\
        --tasks lambada_openai,piqa --limit 120 --oracle 64 --output runs/demo/scores
    accelerate launch --multi_gpu --num_processes 2 eval/harness.py ...         # data parallel

Policies: full, exit=K, certified, risk=EPSILON and budget=SHARE (certificates of train/calibrate.py), thresholds=A,B,..
All policies are scored in one pass, and generate as one batch, as far as they agree; tokens/s are of a task's first
batch, generated under each alone. Per policy, two files in OUTPUT/MODEL:

    results_TIME.json      as lm-eval writes it
    adaptive_TIME.json     trace statistics: mean depth, histogram, relative FLOPs and bytes, tokens/s, by task

Tasks are names that lm-eval knows (these need a hub), or those of local YAML files (--include_path).
eval/leaderboard.py draws the page. What a log-likelihood is under a policy: adaptive/scoring.py. Extra: [eval].
"""

import sys
from dataclasses import dataclass, field

from adaptive.checked import Checked, load_config


@dataclass
class HarnessConfig(Checked):
    """What to evaluate, on what.

    Attributes:
        model: folder or repository of a model with exits
        tasks: names of tasks or groups
        output: folder for the results
        policy: who leaves where, one or several; the top of this file lists the kinds
        include_path: folder of further tasks, as YAML
        limit: documents per task, below 1 a share of them; none = all
        num_fewshot: examples before each question; none = as the task says
        chat_template: put questions into the tokenizer's chat template
        system_instruction: for the chat template
        fewshot_as_multiturn: with a chat template, examples as turns of a conversation
        batch_size: rows at once; texts are generated for that many under every policy
        max_length: longest context in tokens; none = the model's
        dtype: of the weights; none = as saved
        device: none = an accelerator if there is one
        gen_kwargs: settings of generation, such as max_gen_toks=64
        oracle: rows per task on which to find out what the best possible gates would save; 0 = leave it out
        log_samples: write samples_TASK_TIME.jsonl, one line per document, too
        bootstrap_iters: resamples behind the standard errors of some metrics
        seed: of few-shot examples and sampling
    """

    model: str
    tasks: list[str]
    output: str
    policy: list[str] = field(default_factory=lambda: ["full", "certified"])
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    batch_size: int = 8
    max_length: int | None = None
    dtype: str | None = None
    device: str | None = None
    gen_kwargs: str | None = None
    oracle: int = 0
    log_samples: bool = False
    bootstrap_iters: int = 1000
    seed: int = 1234

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(1, "batch_size", "max_length") + self._below(0, "oracle", "num_fewshot", "bootstrap_iters")
        found += [f"`{name}` is empty; name at least one" for name in ("tasks", "policy") if not getattr(self, name)]
        if self.limit is not None and self.limit <= 0:
            found.append(f"`limit` is {self.limit}; give a number of documents, or a share of them below 1")
        return found


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(HarnessConfig)

import time
from dataclasses import asdict
from pathlib import Path

try:
    import lm_eval
except ImportError as error:
    raise SystemExit("eval/harness.py needs lm-eval; run: pip install -e '.[eval]'") from error
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from adaptive.harness import AdaptiveLM, policy_names
from adaptive.provenance import provenance
from adaptive.runs import write_json


def main(config: HarnessConfig) -> list[Path]:
    """Evaluates every policy; returns the side files written, none but in the first process."""
    policies = policy_names(config.policy)
    lm = AdaptiveLM(
        config.model,
        ";".join(policies),
        oracle=config.oracle,
        device=config.device,
        dtype=config.dtype,
        batch_size=config.batch_size,
        max_length=config.max_length,
    )
    manager, written = task_manager(config), []
    for name in policies:
        lm.policy = name
        tracker = EvaluationTracker(output_path=config.output)
        begun = time.perf_counter()
        results = lm_eval.simple_evaluate(
            lm,
            {"pretrained": config.model, "policy": name},
            tasks=list(config.tasks),
            num_fewshot=config.num_fewshot,
            batch_size=config.batch_size,
            device=str(lm.device),
            limit=config.limit,
            bootstrap_iters=config.bootstrap_iters,
            log_samples=config.log_samples,
            evaluation_tracker=tracker,
            system_instruction=config.system_instruction,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            gen_kwargs=config.gen_kwargs,
            task_manager=manager,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
        seconds, statistics = time.perf_counter() - begun, lm.summaries(name)
        if statistics is not None:
            print(f"\n{name}")
            written.append(save(config, name, lm, tracker, results, statistics, seconds))
    return written


def task_manager(config: HarnessConfig) -> TaskManager:
    """Returns where tasks are found; lm-eval's own thousands are read only if one of them is meant."""
    if config.include_path is not None:
        local = TaskManager(include_path=config.include_path, include_defaults=False)
        if set(config.tasks) <= set(local.all_tasks):
            return local
    return TaskManager(include_path=config.include_path)


def save(config, name: str, lm: AdaptiveLM, tracker, results: dict, statistics: dict, seconds: float) -> Path:
    """Writes lm-eval's own files and the one beside them; prints both in short; returns the latter's path."""
    table, samples = make_table(results), results.pop("samples", None)
    tracker.save_results_aggregated(results, samples)
    for task in samples or {}:
        tracker.save_results_samples(task, samples[task])
    folder = Path(config.output) / tracker.general_config_tracker.model_name_sanitized
    path = folder / f"adaptive_{tracker.date_id}.json"
    if not (folder / f"results_{tracker.date_id}.json").exists():
        raise OSError(f"lm-eval could not write its results into {folder}; make room, and run it again")
    certificate, model = lm.certificates.get(name), lm.model
    document = {
        "policy": name,
        "thresholds": [None if t == float("inf") else t for t in lm.policies[name].thresholds],
        "certificate": certificate and {
            key: getattr(certificate, key) for key in ("kind", "epsilon", "delta", "harm", "certified", "n", "bound")
        },
        "model": config.model,
        "backbone": str(model.view.inner.name_or_path),
        "exits": model.exit_config.to_dict(),
        "layers": model.view.num_layers,
        "statistics": statistics,
        "examples": lm.examples[name],
        "seconds": seconds,
        "scored_together": list(lm.policies),
        "processes": lm.world_size,
        "config": asdict(config),
        "provenance": provenance("lm_eval"),
    }  # fmt: skip
    write_json(path, document)
    print(f"{table}\n{costs(statistics)}\n{path}")
    return path


def costs(statistics: dict) -> str:
    """Returns the trace statistics as a Markdown table."""
    names = ["task", "tokens", "mean depth", "FLOPs", "bytes", "FLOPs of the oracle", "unlisted", "tokens/s"]
    rows = [names, ["---"] * len(names)]
    for task, found in [*statistics["tasks"].items(), ("all", statistics["all"])]:
        if "tokens" not in found:
            continue
        rate, oracle = found["tokens_per_second"], found["oracle"]
        row = [task, str(found["tokens"]), f"{found['mean_depth']:.2f}", f"{found['relative_flops']:.3f}"]
        row += [f"{found['relative_bytes']:.3f}", f"{oracle['relative_flops']:.3f}" if oracle else "-"]
        rows.append([*row, f"{found['unlisted']:.2%}", f"{rate:.1f}" if rate else "-"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main(CONFIG)
