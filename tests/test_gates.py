"""Gates compared offline: a second look pays for who stays, thresholds are the best ones, figures come out whole."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import VOCAB, script, tiny
from test_study import EXITS

from adaptive import EarlyExitModel, ExitConfig, data


@pytest.fixture(scope="module")
def gates():
    return script("eval/gates")


def arrays(seed=0, tokens=40, exits=2):
    """First and second scores, harms, prices, prices of looks and rows of made-up tokens."""
    generator = np.random.default_rng(seed)
    first, second = generator.normal(size=(2, tokens, exits))
    harms = (generator.random((tokens, exits)) > 1 / (1 + np.exp(-first - second))).astype(float)
    prices = np.cumsum(generator.random((tokens, exits + 1)) + 0.2, 1)
    return first, second, harms, prices, np.array([0.2, 0.1])[:exits], np.repeat(np.arange(8), tokens // 8)


def test_a_look_in_vain_is_paid_for(gates):
    first, second = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]]), np.array([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]])
    prices = np.array([[1.0, 2.0, 3.0]] * 3)
    thresholds, looks, harms = np.array([[1.0, 1.0], [-1.0, 1.0]]), np.array([0.1, 0.01]), np.zeros((3, 2))
    # No look at the first exit and one in vain at the second; one in vain at the first; two in vain.
    expected = [3.01, 2.1, 3.11]
    got = [
        gates.measured(
            thresholds, first[i : i + 1], second[i : i + 1], harms[:1], prices[:1], looks, np.zeros(1, int), 1
        )
        for i in range(3)
    ]
    assert [cost for _, cost in got] == pytest.approx(expected)
    closed = np.array([[1.0, np.inf], [-1.0, np.inf]])
    assert gates.measured(closed, first, second, harms, prices, looks, np.arange(3), 1) == (0, 3)


@pytest.mark.parametrize("two", [True, False])
def test_the_best_cut_is_the_best_of_all(gates, two):
    first, second, harms, prices, looks, rows = arrays()
    first, weight = first if two else None, 3.0
    share, scale = 1 / (8 * 5), 1 / len(prices)
    leave = prices * scale
    leave[:, :-1] += weight * share * harms
    thresholds = np.array([[-0.5, 0.3], [0.0, np.inf]])

    def value(cuts):
        harm, cost = gates.measured(np.array(cuts), first, second, harms, prices, looks, rows, 1.0)
        return cost + weight * harm

    for index in (0, 1):
        others = [tuple(row) for row in thresholds]
        levels = [-np.inf] if first is None else np.quantile(first[:, index], np.linspace(0, 1, 12, endpoint=False))
        tried = [(inf, inf) for inf in (np.inf,)] + list(itertools.product(levels, second[:, index]))
        best = min(value([*others[:index], cut, *others[index + 1 :]]) for cut in tried)
        got = gates.best_cut(thresholds, first, second, index, leave, looks * scale)
        assert value([*others[:index], got, *others[index + 1 :]]) == pytest.approx(best)


def test_figures_come_out_whole(gates, tmp_path, capsys):
    torch.manual_seed(0)
    tiny("llama").save_pretrained(tmp_path / "model")
    exits = ExitConfig(**EXITS, gate="mlp")
    model = EarlyExitModel.from_backbone(str(tmp_path / "model"), exits, dtype=torch.float32)
    model.save_pretrained(tmp_path / "run")
    for name, seed in (("train", 0), ("judge", 1)):
        ids = torch.randint(3, VOCAB, (24, 12), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        data.save_tokens(tmp_path / f"{name}.safetensors", {"input_ids": ids, "labels": ids.masked_fill(ids < 9, -100)})
    files = [[str(tmp_path / f"{name}.safetensors")] for name in ("train", "judge")]
    output = tmp_path / "out" / "gates.json"
    output.parent.mkdir()
    config = gates.GatesConfig(str(tmp_path / "run"), *files, str(tmp_path / "states"), str(output), splits=1)
    record = gates.main(config)
    assert json.loads(output.read_text())["ways"] == record["ways"] and {"command", "commit"} <= set(record)
    assert f"| gate of the run | {record['ways']['gate of the run']['auc'][0]:.2f}" in capsys.readouterr().out
    free, paid = (record["ways"][f"max_prob{name}"] for name in (", as if it cost nothing", ""))
    assert free["auc"] == paid["auc"] and record["oracle"] <= min(free["relative_flops"].values())
    assert len(record["ways"]) == 17
