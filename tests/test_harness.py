"""lm-eval through the exits: scores move with depth, full depth is plain hf, an exit is its sliced checkpoint."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import VOCAB, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive import EarlyExitModel, ExitConfig

lm_eval = pytest.importorskip("lm_eval", reason="comes with the extra `eval`")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from adaptive.harness import AdaptiveLM, EndOfRow, policy_named, policy_names  # noqa: E402

ROOT = Path(__file__).parents[1]
TASKS = ["choices", "words", "pages", "answers"]
KINDS = {
    "choices": {"output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_target": "gold",
                "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "words": {"output_type": "loglikelihood", "doc_to_text": "{{query}}", "doc_to_target": " {{choices[gold]}}",
              "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
    "pages": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{query}}",
              "metric_list": [{"metric": "word_perplexity"}]},
    "answers": {"output_type": "generate_until", "doc_to_text": "{{query}}", "doc_to_target": "{{choices[0]}}",
                "generation_kwargs": {"until": ["w41"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, its exits, a copy cut after block 2, and tasks whose answers the model knows."""
    place = tmp_path_factory.mktemp("harness")
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0")
    tokenizer.chat_template = "{% for m in messages %}w7 {{ m['content'] }} {% endfor %}w8"
    backbone = tiny("llama")
    # Plain hf ends a row early at this token only: what it writes behind a stop word depends on its neighbours.
    backbone.generation_config.eos_token_id = 2
    backbone.save_pretrained(place / "model")
    model = EarlyExitModel.from_backbone(str(place / "model"), ExitConfig(depths=[1, 2, 3], head="norm"))
    for gate in model.exits.gates:
        torch.nn.init.normal_(gate.read.weight, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(place / "run")
    sliced = tiny("llama")
    sliced.model.layers = sliced.model.layers[:2]
    sliced.config.num_hidden_layers = 2
    sliced.generation_config.eos_token_id = 2
    sliced.save_pretrained(place / "sliced")
    for folder in ("model", "sliced"):
        tokenizer.save_pretrained(place / folder)
    generator = torch.Generator().manual_seed(0)
    with open(place / "docs.jsonl", "w") as file:
        for index in range(32):
            ids = torch.randint(3, VOCAB, (4 + index % 7,), generator=generator)
            best = backbone.generate(ids[None], max_new_tokens=2, do_sample=False)[0, -2:].tolist()
            wrong = torch.randint(3, VOCAB, (3, 2), generator=generator).tolist()
            gold = index % 4
            # Two words each, so that a continuation has a token behind the first one.
            choices = [f"w{one} w{two}" for one, two in [*wrong[:gold], best, *wrong[gold:]]]
            row = {"query": " ".join(f"w{n}" for n in ids.tolist()), "choices": choices, "gold": gold}
            file.write(json.dumps(row) + "\n")
    for name, kind in KINDS.items():
        task = {"task": name, "dataset_path": "json", "test_split": "test", "target_delimiter": " ",
                "dataset_kwargs": {"data_files": {"test": str(place / "docs.jsonl")}}, **kind}  # fmt: skip
        (place / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return place


def evaluated(lm, place, tasks=TASKS, **settings):
    """Results by task, and what was answered to each document."""
    manager = TaskManager(include_path=str(place), include_defaults=False)
    settings = {"bootstrap_iters": 0, "log_samples": True, **settings}
    found = lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=manager, **settings)
    answers = {task: [sample["filtered_resps"] for sample in found["samples"][task]] for task in tasks}
    return found["results"], answers


def adaptive(place, policy, **settings):
    return AdaptiveLM(str(place / "run"), policy, device="cpu", **settings)


def flat(answers):
    """All numbers and texts of nested answers."""
    if isinstance(answers, (list, tuple)):
        return [item for answer in answers for item in flat(answer)]
    return [answers]


def assert_same(found, expected, rel):
    """Nested answers agree: texts exactly, numbers to a relative tolerance."""
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
        assert ours == (theirs if isinstance(theirs, (str, bool)) else pytest.approx(theirs, rel=rel))


def assert_metrics(found, expected, rel=1e-4):
    """Results by task agree in every metric but the standard errors."""
    for task, metrics in expected.items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                assert found[task][name] == pytest.approx(value, rel=rel), (task, name)


def test_full_is_plain_hf_and_exits_that_know_nothing_are_at_chance(place):
    exits = ExitConfig(depths=[1, 2, 3], head="linear", rank=8)
    model = EarlyExitModel.from_backbone(str(place / "model"), exits)
    generator = torch.Generator().manual_seed(0)
    for weight in model.exits.heads.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    lm = AdaptiveLM(model, "full;exit=1;exit=2;exit=3", folder=str(place / "model"), batch_size=4)
    plain, expected = evaluated(HFLM(str(place / "model"), device="cpu", batch_size=4), place)
    found = {}
    for name in list(lm.policies):
        lm.policy = name
        found[name], answers = evaluated(lm, place)
        if name == "full":
            assert_metrics(found[name], plain)
            assert_same(list(answers.values()), list(expected.values()), 1e-4)
    accuracy = [found[name]["choices"]["acc,none"] for name in lm.policies]
    chance, error = 1 / 4, math.sqrt(1 / 4 * 3 / 4 / 32)  # of four choices, over 32 documents
    assert accuracy[0] > 0.8 and all(abs(value - chance) < 3 * error for value in accuracy[1:]), accuracy
    perplexity = [found[name]["words"]["perplexity,none"] for name in lm.policies]
    assert min(perplexity[1:]) > 5 * perplexity[0] and len(set(perplexity)) == 4, perplexity
    statistics = {name: lm.summaries(name)["all"] for name in lm.policies}
    assert [round(found["mean_depth"]) for found in statistics.values()] == [4, 1, 2, 3]
    costs = [found["relative_flops"] for found in statistics.values()]
    assert costs[0] == 1 and costs[1] < costs[2] < costs[3] < 1.1


def test_an_exit_is_the_sliced_checkpoint_document_by_document(place):
    found, answers = evaluated(adaptive(place, "exit=2", batch_size=4), place)
    plain, expected = evaluated(HFLM(str(place / "sliced"), device="cpu", batch_size=4), place)
    assert_metrics(found, plain)
    assert_same(list(answers.values()), list(expected.values()), 1e-4)


def test_the_batch_size_changes_nothing(place):
    found = {}
    for size in (1, 4, 16):
        lm = adaptive(place, "thresholds=0.5/0.5/0.5;full", batch_size=size)
        found[size] = list(evaluated(lm, place, limit=12)[1].values())
        shares = [share for _, share in lm.summaries(lm.policy)["all"]["histogram"]]
        assert min(shares) > 0.01, "tokens must leave everywhere"
    assert_same(found[4], found[1], 1e-6)
    assert_same(found[16], found[1], 1e-6)


def test_one_pass_serves_all_policies(place, monkeypatch):
    import adaptive.harness as harness

    calls = []
    monkeypatch.setattr(harness, "score", lambda *args, inner=harness.score: calls.append(1) or inner(*args))
    lm = adaptive(place, "full;exit=2", batch_size=16)
    for name in list(lm.policies):
        lm.policy = name
        evaluated(lm, place, ["words"], limit=16)
    assert len(calls) == 1


@pytest.mark.parametrize("sampled", [False, True])
def test_texts_of_policies_together_are_those_of_each_alone(place, monkeypatch, sampled):
    names, calls = ["full", "exit=2", "thresholds=0.5/0.5/0.5"], []
    settings = {"limit": 12, "gen_kwargs": "do_sample=true,temperature=1.5" if sampled else None}
    inner = EarlyExitModel.generate
    monkeypatch.setattr(EarlyExitModel, "generate", lambda *a, **b: calls.append(len(b["input_ids"])) or inner(*a, **b))
    together, found = adaptive(place, ";".join(names), batch_size=4), {}
    for together.policy in names:
        found[together.policy] = evaluated(together, place, ["answers"], **settings)[1]
    assert calls == [4, 4, 4, 4, 12, 12], "a first batch to warm up and to time each alone; the others are shared"
    for name in names:
        alone = adaptive(place, name, batch_size=4)
        assert_same([*evaluated(alone, place, ["answers"], **settings)[1].values()], [*found[name].values()], 0)
        ours, theirs = (lm.summaries(name)["tasks"]["answers"] for lm in (together, alone))
        assert ours.pop("tokens_per_second") > 0 and theirs.pop("tokens_per_second") > 0
        assert ours == theirs and together.examples[name] == alone.examples[name]
    assert len({str(answers) for answers in found.values()}) == 3


def test_a_task_whose_requests_another_one_had_has_its_own_statistics(place):
    both, alone = adaptive(place, "full;thresholds=0.5/0.5/0.5"), adaptive(place, "full;thresholds=0.5/0.5/0.5")
    for lm, tasks in ((both, ["choices", "words"]), (alone, ["words"])):
        for name in lm.policies:
            lm.policy = name
            evaluated(lm, place, tasks)
    for name in both.policies:
        ours, theirs = (lm.summaries(name)["tasks"].get("words") for lm in (both, alone))
        assert ours and ours == theirs


def test_repeated_requests_are_drawn_anew(place):
    lm = adaptive(place, "full;exit=1", batch_size=4)
    ids = torch.arange(3, 8).repeat(4, 1)

    def ask(policy):
        lm.policy = policy
        kwargs = {"do_sample": True, "temperature": 1.5, "attention_mask": torch.ones_like(ids)}
        return [lm._model_generate(ids, 25, [], **kwargs) for _ in range(2)]

    first, second = ask("full")
    assert not torch.equal(first, second)
    made = len(lm._said)
    assert not any(map(torch.equal, ask("exit=1"), (first, second))) and len(lm._said) == made  # made with the others


def test_a_stop_is_of_one_row_and_of_what_was_said(place):
    tokenizer = adaptive(place, "full").tokenizer
    stop = EndOfRow(tokenizer.decode([7]), tokenizer, 2, 2)
    drafted, kept = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 9, 9]])
    assert stop(drafted.repeat(2, 1), None).all()  # as "verify" asks, about a draft of one row
    assert not stop(kept.repeat(2, 1), None).any()
    assert stop(torch.cat([kept, drafted]), None).tolist() == [False, True]


def test_policies_are_named_and_the_unknown_refused(place):
    model = EarlyExitModel.from_pretrained(place / "run")
    assert policy_named("thresholds=0.5/inf/0", model, place)[0].thresholds == (0.5, math.inf, 0.0)
    assert policy_named("exit:4", model, place)[0] == policy_named("full", model, place)[0]
    assert policy_names(["full", "thresholds=0.5", "inf", "1e-3", "exit=2"]) == [
        "full",
        "thresholds=0.5/inf/1e-3",
        "exit=2",
    ]
    with pytest.raises(ValueError, match="come twice"):
        policy_names(["full", "exit=2", "full"])
    for name, reason in {
        "exit=9": "no exit at depth 9",
        "certified": "no certificate",
        "risk=0.1": "no risk of 0.1",
        "thresholds=1": "1 thresholds for 3 exits",
        "best": "none of: full, exit=K",
    }.items():
        with pytest.raises(ValueError, match=reason):
            policy_named(name, model, place)


def run(place, output, *flags, launcher=()):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(place / "cache")}
    words = [sys.executable, *launcher, str(ROOT / "eval" / "harness.py"), "--model", str(place / "run")]
    words += ["--include_path", str(place), "--output", str(output), "--bootstrap_iters", "0", *flags]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


def test_the_command_writes_both_files_for_each_policy(place, tmp_path):
    done = run(place, tmp_path, "--tasks", "choices,answers", "--policy", "full", "exit=2", "--limit", "9",
               "--oracle", "4", "--chat_template", "true", "--num_fewshot", "1", "--log_samples", "true")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    side = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("adaptive_*.json"))]
    own = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("results_*.json"))]
    assert [found["policy"] for found in side] == ["full", "exit=2"] and len(own) == 2
    assert {path.name.split("_")[1] for path in tmp_path.rglob("samples_*.jsonl")} == {"choices", "answers"}
    assert own[0]["config"]["model_args"]["policy"] == "full" and own[0]["n-shot"]["choices"] == 1
    assert own[0]["chat_template"] and "adaptive" not in own[0]
    for found, depth in zip(side, (4, 2)):
        tokens = found["examples"]["answers"]["tokens"]
        assert tokens and {tuple(where) for _, *where in tokens} == {(depth, depth < 4)}
        assert found["statistics"]["tasks"]["answers"]["tokens_per_second"] > 0
        oracle = found["statistics"]["tasks"]["choices"]["oracle"]
        assert oracle["relative_flops"] <= 1 and oracle["tokens"] > 0
    assert "| choices" in done.stdout and "full" in done.stdout


def test_what_scoring_takes_is_compared_with_plain_hf(place, tmp_path):
    words = [sys.executable, str(ROOT / "eval" / "overhead.py"), "--model", str(place / "run"), "--limit", "3"]
    words += ["--include_path", str(place), "--output", str(tmp_path / "o.json"), "--policy", "full", "exit=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(place / "cache")}
    done = subprocess.run([*words, "--tasks", "words,answers"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "o.json").read_text())
    assert list(found["tasks"]) == ["words", "answers"] and "all 2 tasks: hf" in done.stdout
    for name in ("hf", "one", "all"):
        assert found["total"]["seconds"][name] == sum(task["seconds"][name] for task in found["tasks"].values()) > 0


def test_two_processes_score_as_one_does(place, tmp_path):
    flags = ["--tasks", "choices,pages", "--policy", "full", "exit=2", "--limit", "10"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port")
    launcher += (str(port),)
    for name, how in (("one", ()), ("two", launcher)):
        done = run(place, tmp_path / name, *flags, launcher=how)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        [json.loads(path.read_text()) for path in sorted((tmp_path / name).rglob("results_*.json"))]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 2
    for single, double in zip(one, two):
        assert_metrics(double["results"], single["results"], 1e-6)
    side = [json.loads(path.read_text()) for path in sorted((tmp_path / "two").rglob("adaptive_*.json"))]
    assert [found["processes"] for found in side] == [2, 2]


def test_help_is_fast_and_faults_are_listed_at_once(tmp_path):
    script = [sys.executable, str(ROOT / "eval" / "harness.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and "--include_path" in shown.stdout and "thresholds=A,B" in shown.stdout
    wrong = subprocess.run([*script, "--batch_size", "0", "--polcy", "full"], capture_output=True, text=True,
                           env=environment)  # fmt: skip
    for fault in ("`--polcy` is no flag; did you mean `--policy`", "`model` is missing", "`tasks` is missing"):
        assert fault in wrong.stderr
