"""The study of recipes: what is kept of a frozen backbone changes nothing, and what is judged agrees with decoding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import LAYERS, VOCAB, script, tiny
from safetensors.numpy import load_file

from adaptive import EarlyExitModel, ExitConfig, data, ranking, states, survey
from adaptive.config import ConfigError, LossConfig, TrainConfig
from adaptive.rows import load_rows, take, to_batch

ROOT = Path(__file__).parent.parent
EXITS = {"depths": [1, 2, 4], "head": ["linear", "mlp", "norm"], "rank": 4, "shortlist": 24, "screen": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, rows to train on, prompts, and a finished study of two variations."""
    folder = tmp_path_factory.mktemp("study")
    tiny("llama").save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (24, 12), generator=generator, dtype=torch.int32)
    labels = ids.masked_fill(torch.arange(12) < 4, -100)
    data.save_tokens(folder / "rows.safetensors", {"input_ids": ids, "labels": labels})
    asked = torch.randint(3, VOCAB, (10, 5), generator=generator).tolist()
    (folder / "prompts.json").write_text(json.dumps({"certify": asked}))
    base = {"model": str(folder / "model"), "data": [str(folder / "rows.safetensors")], "output": "unused",
            "exits": EXITS, "loss": {"negatives": None}, "steps": 6, "batch_size": 4, "eval_every": 6}  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    return folder


@pytest.fixture(scope="module")
def studied(place):
    """The study's folder."""
    study = script("eval/study")
    shared = {"exits": {"head": ["block", "mlp", "norm"], "head_kv": "shared"}}
    variations = {"plain": None, "longer": {"steps": 8, "exits": {"gate": "mlp"}}, "shared": shared}
    config = study.StudyConfig(str(place / "base.yaml"), str(place / "prompts.json"), str(place / "out"), variations,
                               answer_tokens=6, ranks=[4, 32], entries=[8, 97])  # fmt: skip
    study.main(config)
    return place / "out"


def built(place, **changes) -> EarlyExitModel:
    torch.manual_seed(1)
    model = EarlyExitModel.from_backbone(
        str(place / "model"), ExitConfig(**EXITS | changes), LossConfig(negatives=None), dtype=torch.float32
    )
    return model.train()


def test_kept_states_change_no_loss_and_no_gradient(place, tmp_path, monkeypatch):
    found = []
    rows = load_rows([str(place / "rows.safetensors")], str(place / "model"), 12)
    rows["attention_mask"][3, 9:] = 0
    rows["labels"][3, 9:] = -100
    for head in ("mlp", "block"):
        for keep in (False, True):
            model = built(place, head=[head, "mlp", "norm"])
            kept = states.with_states(model, rows, tmp_path) if keep else rows
            out = model(**to_batch(take(kept, torch.tensor([3, 5, 0])), torch.device("cpu")))
            out.loss.backward()
            found.append([out.loss, *(p.grad for p in model.exit_parameters() + model.gate_parameters())])
        for without, with_kept in zip(*found[-2:], strict=True):
            assert torch.allclose(without, with_kept, atol=1e-5)
    # A second time nothing is worked out, and for another depth only that depth.
    seen, real = [], states.full_states
    monkeypatch.setattr(states, "full_states", lambda *args: seen.append(args[3]) or real(*args))
    again = states.with_states(built(place), rows, tmp_path)
    assert not seen and torch.equal(again["states"], kept["states"]) and torch.equal(again["top"], kept["top"])
    other = states.with_states(built(place, depths=[1, 3, 4]), rows, tmp_path)
    assert set(seen) == {(3,)} and torch.equal(other["states"][:, :, [0, 2, 3]], kept["states"][:, :, [0, 2, 3]])
    assert not torch.equal(other["states"][:, :, 1], kept["states"][:, :, 1])
    # A file that was cut short is made again.
    for path in tmp_path.rglob("depth-3.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(states.with_states(built(place, depths=[1, 3, 4]), rows, tmp_path)["states"], other["states"])
    # Other rows are not mistaken for these.
    assert len(list(tmp_path.iterdir())) == 1
    states.with_states(built(place), take(rows, torch.arange(5)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_kept_states_are_refused_where_the_backbone_learns():
    settings = {"data": ["x"], "output": "y", "steps": 1, "states": "z"}
    with pytest.raises(ConfigError, match="`states` is 'z'"):
        TrainConfig(**settings, exits=ExitConfig([1]), mode="lora")
    with pytest.raises(ConfigError, match="`states` is 'z'"):
        TrainConfig(**settings, exits=ExitConfig([1], head="block", head_kv="shared"))


@pytest.mark.parametrize("name", ["plain", "shared"])
def test_what_is_judged_is_what_a_survey_sees(place, studied, name):
    """Scores and regrets of one teacher-forced pass against decoding with every exit probed."""
    model = EarlyExitModel.from_pretrained(studied / name, dtype=torch.float32)
    found, record = load_file(studied / f"{name}.safetensors"), json.loads((studied / f"{name}.json").read_text())
    asked = json.loads((place / "prompts.json").read_text())["certify"]
    expected = survey.survey(model, asked, 6)
    later = found["place"] > 0
    assert np.array_equal(found["row"][later], expected.rows)
    assert np.allclose(found["gate"][later], expected.scores, atol=1e-4)
    assert np.allclose(found["regret"][later], expected.regret, atol=1e-3)
    priced = [model.costs.by_exit(context) for context in found["context"][later]]
    assert np.array_equal(priced, expected.costs)
    for score in ("max_prob", "margin", "entropy", "similarity"):
        gates = EarlyExitModel.from_pretrained(studied / name, dtype=torch.float32)
        gates.exits.gates = torch.nn.ModuleList(type(gate)(gates.view, score) for gate in gates.exits.gates)
        assert np.allclose(found[score][later], survey.survey(gates, asked, 6).scores, atol=1e-4), score
    assert record["training"]["tokens"] == 6 * 4 * 8 and record["training"]["different_tokens"] <= 23 * 8
    assert {"command", "commit", "machine", "versions", "date"} <= set(record)


def test_what_full_depth_pays_is_judged_by_the_original(place, tmp_path):
    study, asked = script("eval/study"), json.loads((place / "prompts.json").read_text())["certify"]
    variations = {"along": {"mode": "lora", "lora_rank": 2, "backbone_rate": 0.3}}
    files = [str(place / "base.yaml"), str(place / "prompts.json"), str(tmp_path)]
    study.main(study.StudyConfig(*files, variations, answer_tokens=6))
    found, record = load_file(tmp_path / "along.safetensors"), json.loads((tmp_path / "along.json").read_text())
    models = [EarlyExitModel.from_backbone(str(place / "model"), ExitConfig([1], head="norm"), dtype=torch.float32),
              EarlyExitModel.from_pretrained(tmp_path / "along", dtype=torch.float32)]  # fmt: skip
    expected = []
    for ids, said in zip(asked, json.loads((tmp_path / "answers.json").read_text())["answers"], strict=True):
        text = torch.tensor([ids + said])
        with torch.no_grad():
            before, after = (m.eval()(text).logits[0, len(ids) - 1 : -1].log_softmax(-1) for m in models)
        word = after.argmax(-1)
        lost = before.amax(-1) - before.gather(-1, word[:, None])[:, 0]
        expected.append(torch.stack([lost, (before.exp() * (before - after)).sum(-1), word == before.argmax(-1)], 1))
    lost, kl, same = torch.cat(expected).numpy().T
    assert np.allclose(found["original_regret"][:, -1], lost, atol=1e-4) and kl.mean() > 0.01
    assert np.allclose(found["original_kl"], kl, atol=1e-4) and np.array_equal(found["original_agrees"], same)
    assert record["by_original"]["full_depth"] == pytest.approx(
        {"no_harm": (lost <= 0.25).mean(), "agrees": same.mean(), "kl": kl.mean()}, abs=1e-4
    )
    assert len(record["by_original"]["no_harm"]) == 3


def test_figures_follow_from_the_arrays(studied, tmp_path, monkeypatch):
    recipes = script("eval/recipes")
    config = recipes.RecipesConfig(str(studied), str(tmp_path), "plain", ["plain", "longer"])
    done = recipes.main(config)
    with monkeypatch.context() as patched:  # a second run takes its figures from the files
        patched.setattr(recipes, "about_exits", None)
        assert recipes.main(config) == done
    assert {record["name"] for record in done} == {"plain", "longer", "shared"}
    for record in done:
        found = load_file(studied / f"{record['name']}.safetensors")
        found["harm"] = (found["regret"] > 0.25).astype(float)
        found["oracle"] = 1 - found["harm"]
        everything = np.ones(len(found["row"]), bool)
        never = recipes.measured(record, found, "gate", (np.inf,) * 3, everything)
        assert (never["harm"], never["relative_flops"], never["mean_depth"]) == (0, 1, LAYERS)
        # By hand, for tokens after the first: the policy's mean cost is what `by_exit` adds up to.
        later = found["place"] > 0
        thresholds = (0.4, 0.5, 0.2)
        costs = recipes.costs_of(record, "gate")
        by_exit = np.array([costs.by_exit(c) for c in found["context"][later]])
        harm, cost = ranking.predicted(
            thresholds, found["gate"][later], found["harm"][later], by_exit, found["row"][later]
        )
        full = np.mean([costs.by_exit(c, [False] * 3)[-1] for c in found["context"][later]])
        shifted = {**found, "place": found["place"] + 1}  # so that none is taken for a first token
        point = recipes.measured(record, shifted, "gate", thresholds, later)
        assert point["relative_flops"] == pytest.approx(cost / full) and point["harm"] == pytest.approx(harm.mean())
        assert sum(point[part] for part in recipes.PARTS) == pytest.approx(1)
        oracle = record["scores"]["oracle"]
        assert oracle["harm"] == 0 and oracle == recipes.measured(record, found, "oracle", (0.5,) * 3, everything)
        for name in recipes.SCORES:
            assert record["scores"][name]["at"]["0.05"]["relative_flops"] <= 1.05
        # A score that reads logits pays for the heads that it asks in vain.
        same = found | {"max_prob": found["gate"], "similarity": found["gate"]}
        middle = tuple(np.median(found["gate"], 0))
        reads, knows = (recipes.measured(record, same, name, middle, everything) for name in ("max_prob", "similarity"))
        assert reads["harm"] == knows["harm"] and reads["overhead"] < knows["overhead"]
    text = (tmp_path / "summary.md").read_text()
    assert text.count("| plain |") == 2 and text.count("| longer |") == 2 and "fixed list" in text
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("frontier", "gates", "tokens"))
    scaling = json.loads((tmp_path / "scaling.json").read_text())
    lines = {line["figure"]: line for line in scaling["lines"]}
    assert scaling["commit"] and scaling["machine"]["threads"]
    assert set(lines) == {f"no harm at {d}" for d in EXITS["depths"]} | {
        f"FLOPs {x}" for x in ("at harm 0.02", "under the oracle")
    }
    sets = json.loads((tmp_path / "spacing.json").read_text())["sets"]
    assert [one["depths"] for one in sets] == [[4], [1, 4], [2, 4], [1, 2, 4]]
    plain = next(record for record in done if record["name"] == "plain")["scores"]
    assert sets[-1]["oracle"] == plain["oracle"]["relative_flops"] and sets[-1]["at"] == plain["gate"]["at"]
    table = json.loads((tmp_path / "screen.json").read_text())["table"]
    assert {row["holds"] for row in table if row["entries"] == 97} == {1.0} and len(table) == 6
    assert next(r for r in table if r["rank"] == 32 and r["entries"] == 8)["holds"] == 1.0  # the whole head


def test_differences_are_paired_over_prompts(studied, tmp_path):
    paired, generator = script("eval/paired"), np.random.default_rng(0)
    values, base = generator.random((2, 12, 5))
    rows = np.repeat(np.arange(12), 5)
    found = paired.compared(values.ravel(), base.ravel(), rows)
    by_prompt = (values - base).mean(1)
    assert found["difference"] == pytest.approx(by_prompt.mean())
    assert found["error"] == pytest.approx(by_prompt.std(ddof=1) / 12**0.5)
    output = tmp_path / "paired.json"
    found = paired.main(paired.PairedConfig(str(studied), ["longer:plain", "plain:plain"], str(output)))
    assert json.loads(output.read_text())["pairs"] == found
    assert {(one["difference"], one["error"]) for one in found["plain:plain"].values()} == {(0, 0)}
    now, then = ((load_file(studied / f"{name}.safetensors")["regret"] <= 0.25).mean(0) for name in ("longer", "plain"))
    assert found["longer:plain"]["no_harm 2"]["difference"] == pytest.approx(now[1] - then[1])
    assert found["longer:plain"]["original kl"]["mean"] == 0 and found["longer:plain"]["original agrees"]["mean"] == 1
    # The oracle pays what the tables say, but for first tokens.
    record, arrays = json.loads((studied / "plain.json").read_text()), load_file(studied / "plain.safetensors")
    arrays |= {"harm": (arrays["regret"] > 0.25).astype(float), "place": arrays["place"] + 1}
    arrays["oracle"] = 1 - arrays["harm"]
    priced = script("eval/recipes").measured(record, arrays, "oracle", (0.5,) * 3, arrays["place"] > 1)
    assert found["plain:plain"]["oracle"]["mean"] == pytest.approx(priced["relative_flops"])
    with pytest.raises(ConfigError, match="`pairs` has \\['plain'\\](.|\n)*has no \\['gone', 'plain-too'\\]"):
        paired.PairedConfig(str(studied), ["plain", "gone:plain-too"], "x.json")


def test_auc_counts_pairs():
    generator = np.random.default_rng(0)
    scores, true = generator.integers(0, 6, 50).astype(float), generator.random(50) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[true] for b in scores[~true]]
    assert ranking.auc(scores, true) == pytest.approx(np.mean(pairs))
    assert ranking.auc(scores, np.ones(50, bool)) is None


def test_a_line_is_found_again():
    """Records that lie on a line give its formula, and the tokens that it wants for the goal."""
    recipes, done = script("eval/recipes"), []
    for tokens in (1000, 10_000, 100_000):
        none = 0.2 + 0.1 * np.log10(tokens)
        costs = {"at": {"0.02": {"relative_flops": 1 - 0.04 * np.log10(tokens)}}}
        scores = {"gate": costs, "oracle": {"relative_flops": 0.7}}
        done.append({"training": {"different_tokens": tokens}, "exits": [{"depth": 3}], "scores": scores,
                     "about_exits": [{"no_harm": none}]})  # fmt: skip
    right, cost, oracle = recipes.scaled(done)
    assert (right["a"], right["b"]) == pytest.approx((0.2, 0.1)) and right["residual"] == pytest.approx(0, abs=1e-9)
    assert cost["log10_tokens_for_goal"] == pytest.approx(6) and right["log10_tokens_for_goal"] is None
    assert oracle["b"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["study", "study_llama", "study_gpt2"])
def test_variations_that_are_shipped_are_sound(name, tmp_path):
    study, values = script("eval/study"), yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    base = yaml.safe_load((ROOT / values["base"]).read_text())
    for variation, change in values["variations"].items():
        plan = study.planned(base, change or {}, tmp_path / variation)
        assert plan["output"] == str(tmp_path / variation) and "exits" in plan


def test_bad_studies_are_refused(place):
    study, recipes = script("eval/study"), script("eval/recipes")
    with pytest.raises(ConfigError, match="`only` has \\['b'\\](.|\n)*`variations.a` must hold"):
        study.StudyConfig("x.yaml", "p.json", "out", {"a": [1]}, only=["b"])
    with pytest.raises(ConfigError, match="did you mean `steps`"):
        study.planned(yaml.safe_load((place / "base.yaml").read_text()), {"stepz": 3}, place / "z")
    with pytest.raises(ValueError, match="lacks \\['gone'\\]; it has \\['certify'\\]"):
        files = [str(place / "base.yaml"), str(place / "prompts.json"), "out"]
        study.answered(None, study.StudyConfig(*files, {}, part="gone"), {})
    with pytest.raises(ValueError, match="holds no judged variation; run eval/study.py first"):
        recipes.main(recipes.RecipesConfig(str(place), "out"))
