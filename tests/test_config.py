"""Configurations: values from YAML and flags, and errors that name everything that is wrong."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adaptive.checked import build, load_config
from adaptive.config import ExitConfig, LossConfig, TrainConfig

NEEDED = ["--data", "a.txt", "--output", "run", "--steps", "10", "--exits.depths", "12,18,24"]


def refused(call, *args, **kwargs) -> str:
    """The message of the ValueError that a call ends in."""
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    return str(error.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_alone_fill_a_config():
    config = load_config(
        TrainConfig, [*NEEDED, "--loss.divergence", "js", "--learning_rate=1e-4", "--gradient_checkpointing", "true"]
    )
    assert config.exits == ExitConfig(depths=[12, 18, 24])
    assert config.loss == LossConfig(divergence="js")
    assert (config.data, config.learning_rate, config.gradient_checkpointing) == (["a.txt"], 1e-4, True)


def test_flags_override_yaml(yaml_file):
    path = yaml_file("""
        data: [a.txt, b.txt]
        output: run
        steps: 10
        learning_rate: 1e-4
        exits: {depths: [2, 4], head: [linear, block], shortlist: 64}
        loss:
          tolerance: 1
        """)
    config = load_config(
        TrainConfig, ["--config", path, "--steps", "20", "--exits.rank", "8", "--loss.tolerance", "0.5"]
    )
    assert (config.steps, config.learning_rate, config.data) == (20, 1e-4, ["a.txt", "b.txt"])
    assert config.exits == ExitConfig(depths=[2, 4], head=["linear", "block"], shortlist=64, rank=8)
    assert config.loss.tolerance == 0.5


def test_flags_fill_a_nested_mapping_that_yaml_leaves_empty(yaml_file):
    path = yaml_file("exits:\nloss:\n")
    assert load_config(TrainConfig, ["--config", path, *NEEDED, "--loss.top_k", "4"]).loss.top_k == 4


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["12"], "depths", [12]),
        (["[12,18]"], "depths", [12, 18]),
        (["12", "18"], "depths", [12, 18]),
        (["8192"], "shortlist", 8192),
        (["none"], "shortlist", None),
        (["8192,none,64"], "shortlist", [8192, None, 64]),
        (["norm,mlp,block"], "head", ["norm", "mlp", "block"]),
        (["mlp"], "head", "mlp"),
    ],
)
def test_flag_words_are_read_as_the_field_asks(words, name, value):
    config = load_config(TrainConfig, [*NEEDED, f"--exits.{name}", *words]).exits
    assert getattr(config, name) == value


def test_everything_wrong_is_named_at_once(yaml_file):
    path = yaml_file("stepps: 3\nseed: yes\nexits: {depths: [3, x], heads: mlp}\nloss: {top_k: 0, layer_dropout: 2}\n")
    message = refused(
        load_config, TrainConfig, ["--config", path, "--learning-rate", "1", "--batch_size", "much", "--output", "run"]
    )
    for part in [
        "`--learning-rate` is no flag; did you mean `--learning_rate`?",
        "`stepps` is no field of TrainConfig; did you mean `steps`?",
        "`exits.heads` is no field of ExitConfig; did you mean `head`?",
        "`exits.depths` is [3, 'x']; allowed: list[int]",
        "`loss.top_k` is 0; it must be 1 or more",
        "`loss.layer_dropout` is 2.0; it is a probability",
        "`data` is missing",
        "`steps` is missing",
        "`seed` is True; allowed: int",
        "`batch_size` is 'much'; allowed: int",
    ]:
        assert part in message
    assert "10 problem(s)" in message


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf])
def test_a_temperature_is_above_nothing(temperature):
    message = refused(build, LossConfig, {"temperature": temperature}, [])
    assert f"`temperature` is {temperature}; it must be above 0" in message


def test_total_variation_has_no_temperature():
    message = refused(build, LossConfig, {"divergence": "tv", "temperature": 2.0}, [])
    assert "`temperature` is 2.0 with `divergence` tv" in message and "choose forward, reverse or js" in message
    for fine in ({"divergence": "tv"}, {"divergence": "js", "temperature": 2.0}):
        build(LossConfig, fine, [])


def test_faulty_values_are_named_beside_unknown_keys():
    message = refused(ExitConfig.from_dict, {"depths": [4, 2], "gaet": "mlp", "rank": 0})
    assert "did you mean `gate`" in message and "`depths` is [4, 2]" in message and "`rank` is 0" in message


def test_a_word_without_a_flag_is_refused():
    assert "`stray` is no flag" in refused(load_config, TrainConfig, ["stray"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_a_file_without_a_mapping_is_refused(yaml_file, text):
    assert "no readable YAML file" in refused(load_config, TrainConfig, ["--config", yaml_file(text)])


def test_a_missing_file_is_refused():
    assert "nowhere.yaml" in refused(load_config, TrainConfig, ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    "values, part",
    [
        ({"depths": []}, "`depths` is empty"),
        ({"depths": [4, 4]}, "larger than the one before"),
        ({"depths": [0, 4]}, "at least 1"),
        ({"depths": [2.0]}, "allowed: list[int]"),
        ({"depths": [True]}, "allowed: list[int]"),
        ({"depths": [2, 4], "head": ["norm"]}, "`head` has 1 entries for 2 exits"),
        ({"depths": [2], "head": "linera"}, "'linear'"),
        ({"depths": [2], "shortlist": 0}, "`shortlist` is 0"),
        ({"depths": [2], "shortlist": 8, "screen": 0}, "`screen` is 0"),
        ({"depths": [2], "screen": 4}, "no exit has a `shortlist`"),
        ({"depths": [2], "gate": "softmax"}, "'max_prob'"),
        ({"depths": [2], "head_kv": "shared"}, "only a 'block' head"),
        ({"depths": [2], "layers": 0}, "`layers` is 0"),
    ],
)
def test_exits_that_cannot_be_are_refused_when_made(values, part):
    assert part in refused(ExitConfig, **values)


def test_exits_are_checked_against_the_backbone_all_at_once():
    config = ExitConfig(depths=[4, 8, 9], shortlist=[None, None, 101], layers=9, head="block")
    message = refused(config.validate, num_layers=8, vocab_size=100)
    for part in [
        "`depths` has [9]; this backbone has 8 blocks",
        "[101]",
        "`depths` has 8, the full depth",
        "`layers` is 9",
    ]:
        assert part in message
    ExitConfig(depths=[4, 8], shortlist=[None, 100]).validate(num_layers=8, vocab_size=100)


def test_a_changed_config_is_checked_again_by_validate():
    config = ExitConfig(depths=[2])
    config.depths = [3, 1]
    assert "`depths` is [3, 1]" in refused(config.validate, num_layers=8, vocab_size=100)


def test_a_single_value_counts_for_every_exit():
    config = ExitConfig(depths=[2, 4], shortlist=[8, None])
    assert config.per_exit("head") == ["linear", "linear"]
    assert config.per_exit("shortlist") == [8, None]
    assert config.per_exit("depths") == [2, 4]


def test_exits_survive_json():
    config = ExitConfig(
        depths=[2, 4], head=["block", "mlp"], shortlist=[8, None], head_kv="shared", blocks="model.layers"
    )
    assert ExitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_loss_weights_are_counted_against_the_exits():
    assert "`loss.weights` has 2 entries for 3 exits" in refused(
        load_config, TrainConfig, [*NEEDED, "--loss.weights", "1,2"]
    )
    assert load_config(TrainConfig, [*NEEDED, "--loss.weights", "1,2,0"]).loss.weights == [1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    "flag, value",
    [("steps", "0"), ("learning_rate", "0"), ("learning_rate", "nan"), ("batch_size", "0"), ("seed", "-1")],
)
def test_numbers_out_of_range_are_refused(flag, value):
    assert f"`{flag}` is" in refused(load_config, TrainConfig, [*NEEDED, f"--{flag}", value])


def test_another_dataclass_is_filled_the_same_way():
    @dataclasses.dataclass
    class Small:
        """A small one.

        Attributes:
            risk: share of tokens, 0 to 1
        """

        risk: float = 0.02

    assert load_config(Small, ["--risk", "1"]) == Small(risk=1.0)
    assert "`risk` is 'high'" in refused(load_config, Small, ["--risk", "high"])


def test_help_names_every_field_and_loads_no_torch():
    code = (
        "import sys\nfrom adaptive.checked import load_config\nfrom adaptive.config import TrainConfig\n"
        "try: load_config(TrainConfig, ['--help'])\n"
        "finally: print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for cls, prefix in ((TrainConfig, ""), (ExitConfig, "exits."), (LossConfig, "loss.")):
        for field in dataclasses.fields(cls):
            assert f"{field.name}: " in cls.__doc__
            assert field.name in ("exits", "loss") or f"--{prefix}{field.name} " in out
    assert out.endswith("False\n")


def test_accelerate_reads_its_configs():
    from accelerate.commands.config.config_args import load_config_from_file

    paths = sorted((Path(__file__).parents[1] / "configs" / "accelerate").glob("*.yaml"))
    assert [path.stem for path in paths] == ["cpu", "deepspeed", "fsdp2", "multi_gpu"]
    for path in paths:
        loaded = load_config_from_file(str(path))
        assert loaded.mixed_precision == yaml.safe_load(path.read_text())["mixed_precision"]
        assert path.read_text().startswith(f"# accelerate launch --config_file configs/accelerate/{path.name} train/")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configurations_that_are_shipped_are_sound(path):
    values = yaml.safe_load(path.read_text())
    assert isinstance(values, dict) and not isinstance(values.get("exits"), str)
    if "exits" in values:
        assert build(TrainConfig, values, []).exits.depths == values["exits"]["depths"]


@pytest.mark.parametrize("gate", ["max_prob", "margin", "entropy"])
def test_a_shortlist_of_one_does_not_go_with_gates_that_compare(gate):
    message = refused(ExitConfig, depths=[2], shortlist=1, gate=gate)
    assert f"`gate` {gate!r} compares entries" in message
    ExitConfig(depths=[2], shortlist=2, gate=gate)
