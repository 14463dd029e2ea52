"""Configurations that check themselves, filled from YAML and then from flags; `--help` prints their `Attributes:`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Head = Literal["norm", "linear", "mlp", "block"]
Gate = Literal["linear", "mlp", "max_prob", "margin", "entropy", "similarity"]
T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; `problems` holds one line for each fault."""

    def __init__(self, name: str, problems: list[str]):
        super().__init__(f"`{name}` has {len(problems)} problem(s):\n" + "\n".join(f"- {line}" for line in problems))
        self.problems = problems


class Checked:
    """A dataclass that refuses wrong types and whatever its own `problems()` finds, as soon as it is made."""

    def __post_init__(self) -> None:
        ready, found = _typed(type(self), vars(self))
        vars(self).update(ready)
        if found := found or self.problems():
            raise ConfigError(type(self).__name__, found)

    def _below(self, least: float, *names: str) -> list[str]:
        """A line for each of these fields that is set and below `least`."""
        values = {name: getattr(self, name) for name in names}
        return [f"`{n}` is {v}; it must be {least} or more" for n, v in values.items() if v is not None and v < least]


@dataclass
class ExitConfig(Checked):
    """Where the exits are and what each is made of. A single value counts for every exit, a list has one per exit.

    Attributes:
        depths: number of decoder blocks run before each exit, ascending
        head: state -> logits: own norm (norm), low-rank adapter (linear), gated MLPs (mlp), decoder blocks (block)
        rank: rank of a linear head's adapter
        layers: number of MLPs or decoder blocks in an mlp or block head
        head_kv: keys and values that a block head attends to: its own, or the backbone's at that depth (shared)
        shortlist: number of vocabulary entries that a head reads; none = all of them
        gate: state -> score: trained (linear, mlp) or a baseline (max_prob, margin, entropy, similarity)
        blocks: dotted path of the backbone's list of decoder blocks; none = found by itself
    """

    depths: list[int]
    head: Head | list[Head] = "linear"
    rank: int = 64
    layers: int = 1
    head_kv: Literal["own", "shared"] = "own"
    shortlist: int | None | list[int | None] = None
    gate: Gate = "linear"
    blocks: str | None = None

    def problems(self) -> list[str]:
        """One line for each fault that shows without knowing the backbone."""
        found = []
        if not self.depths:
            found.append("`depths` is empty; name at least one, e.g. [12, 18, 24]")
        elif self.depths != sorted(set(self.depths)) or self.depths[0] < 1:
            found.append(f"`depths` is {self.depths}; each must be at least 1 and larger than the one before it")
        for name in ("head", "shortlist"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(self.depths):
                found.append(f"`{name}` has {len(value)} entries for {len(self.depths)} exits; give one each or one")
        found += self._below(1, "rank", "layers")
        if any(size is not None and size < 1 for size in self.per_exit("shortlist")):
            found.append(f"`shortlist` is {self.shortlist}; each must be at least 1 entry, or none for all entries")
        if self.head_kv == "shared" and "block" not in self.per_exit("head"):
            found.append(f"`head_kv` is 'shared' but `head` is {self.head!r}; only a 'block' head has keys and values")
        return found

    def per_exit(self, name: str) -> list:
        """The values of field `name`, one per exit: a single value is repeated."""
        value = getattr(self, name)
        return list(value) if isinstance(value, list) else [value] * len(self.depths)

    def validate(self, num_layers: int, vocab_size: int) -> None:
        """Check against a backbone of `num_layers` decoder blocks and `vocab_size` vocabulary entries.

        Raises:
            ValueError: listing every fault at once.
        """
        found = self.problems()
        if deep := [depth for depth in self.depths if depth > num_layers]:
            found.append(f"`depths` has {deep}; this backbone has {num_layers} blocks: use depths 1 to {num_layers}")
        if large := [size for size in self.per_exit("shortlist") if size is not None and size > vocab_size]:
            found.append(f"`shortlist` has {large}; this backbone's vocabulary has {vocab_size} entries: lower it")
        if (num_layers, None) in zip(self.depths, self.per_exit("shortlist")):
            found.append(f"`depths` has {num_layers}, the full depth: leave it out or give its exit a `shortlist`")
        if self.layers > num_layers and {"block", "mlp"} & set(self.per_exit("head")):
            found.append(f"`layers` is {self.layers}; heads are copied from the backbone's {num_layers} blocks")
        if found:
            raise ConfigError("ExitConfig", found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExitConfig:
        """The configuration that `to_dict` wrote; ValueError names all unknown keys and faulty values."""
        return _build(cls, values, [])


@dataclass
class LossConfig(Checked):
    """What an exit is trained towards.

    Attributes:
        divergence: of the exit from the full model: KL from full to exit (forward), exit to full (reverse), or js
        cross_entropy: weight of the labels' cross-entropy beside the divergence
        weights: weight of each exit in the sum; none = equal
        top_k: number of the teacher's likeliest entries in the distillation
        negatives: number of random vocabulary entries beside them, shared by a step; none = the exact sum, in chunks
        tolerance: regret in nats up to which a token does no harm; the gates' target
        final: weight of the full depth's own distillation term (modes lora and full)
        layer_dropout: largest probability of skipping a block in training, reached at the last block
        curriculum: which exits take part in a step: all of them (none) or in turn (rotational)
    """

    divergence: Literal["forward", "reverse", "js"] = "forward"
    cross_entropy: float = 0.0
    weights: list[float] | None = None
    top_k: int = 16
    negatives: int | None = 2048
    tolerance: float = 0.25
    final: float = 1.0
    layer_dropout: float = 0.0
    curriculum: Literal["rotational"] | None = None

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(0, "cross_entropy", "tolerance", "final") + self._below(1, "top_k", "negatives")
        if self.weights is not None and (not self.weights or min(self.weights) < 0 or sum(self.weights) == 0):
            found.append(f"`weights` is {self.weights}; none may be negative and one must be above 0")
        if not 0 <= self.layer_dropout < 1:
            found.append(f"`layer_dropout` is {self.layer_dropout}; it is a probability: 0 or more and below 1")
        return found


@dataclass(kw_only=True)
class TrainConfig(Checked):
    """One training run of the exits.

    Attributes:
        model: folder or hub id of the backbone
        data: training texts: folders, files, token files or names of data sets
        output: folder that the run writes to
        mode: what moves: the exits (frozen), also adapters on the backbone (lora), or all weights (full)
        lora_rank: rank of the adapters in mode lora
        exits: where the exits are and what they are made of
        loss: what they are trained towards
        sequence_length: tokens per sequence
        batch_size: sequences per device and forward pass
        accumulate: forward passes per optimizer step
        steps: optimizer steps
        learning_rate: the largest of the schedule
        gate_share: last share of the steps, in which only the gates move
        gradient_checkpointing: recompute activations in the backward pass, for less memory
        eval_every: optimizer steps from one evaluation to the next
        seed: of initial values, data order and sampling
        log_with: tracker known to accelerate (wandb, tensorboard, ...); none = off
    """

    model: str = "smollm2-135m-instruct"
    data: list[str]
    output: str
    mode: Literal["frozen", "lora", "full"] = "frozen"
    lora_rank: int = 16
    exits: ExitConfig
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    sequence_length: int = 256
    batch_size: int = 8
    accumulate: int = 1
    steps: int
    learning_rate: float = 1e-3
    gate_share: float = 0.2
    gradient_checkpointing: bool = False
    eval_every: int = 50
    seed: int = 0
    log_with: str | None = None

    def problems(self) -> list[str]:
        """One line for each fault, those that `exits` and `loss` have together included."""
        found = self._below(1, "lora_rank", "batch_size", "accumulate", "steps", "eval_every")
        found += self._below(2, "sequence_length") + self._below(0, "seed")
        if not self.data:
            found.append("`data` is empty; name at least one folder, file or data set")
        if not 0 < self.learning_rate < math.inf:
            found.append(f"`learning_rate` is {self.learning_rate}; it must be above 0")
        if not 0 <= self.gate_share < 1:
            found.append(f"`gate_share` is {self.gate_share}; it is a share of the steps: 0 or more and below 1")
        if (weights := self.loss.weights) is not None and len(weights) != len(self.exits.depths):
            found.append(f"`loss.weights` has {len(weights)} entries for {len(self.exits.depths)} exits; give one each")
        return found


def load_config(argv: Sequence[str] | None = None, cls: type[T] = TrainConfig) -> T:
    """The configuration a command line asks for: `--config x.yaml` sets, flags override (`--exits.depths 12,18,24`).

    Args:
        argv: words of the command line; None = those of this process.
        cls: the dataclass to fill; its `Attributes:` block is the help text.

    Raises:
        ValueError: unknown keys (with what was probably meant), wrong types, missing and faulty values, all at once.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--FIELD VALUE ...]", description=cls.__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the fields below; flags override it")
    fields = _flat_fields(cls)
    for name, (annotation, text) in fields.items():
        parser.add_argument(f"--{name}", nargs="+", metavar="", help=f"{text} ({inspect.formatannotation(annotation)})")
    given, unknown = parser.parse_known_args(argv)
    try:
        values = (yaml.safe_load(Path(given.config).read_text()) if given.config else None) or {}
        if not isinstance(values, dict):
            raise yaml.YAMLError("it holds no `name: value` lines")
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"`--config` is {given.config!r}, which is no readable YAML file: {error}") from error
    # A word that no flag claims is the value of a misspelt flag, unless there is none.
    flags = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown
    problems = [f"`{word}` is no flag{_meant(word, [f'--{name}' for name in ('config', *fields)])}" for word in flags]
    for name, (annotation, _) in fields.items():
        if getattr(given, name) is not None:
            *parents, leaf = name.split(".")
            target = values
            for parent in parents:
                target[parent] = target[parent] if isinstance(target.get(parent), dict) else {}
                target = target[parent]
            target[leaf] = _from_words(getattr(given, name), annotation)
    return _build(cls, values, problems)


def _build(cls: type[T], values: dict[str, Any], problems: list[str]) -> T:
    """A `cls` dataclass filled from `values`, nested mappings included; ConfigError with all `problems` and its own."""
    hints, ready = get_type_hints(cls), {}
    unknown = [key for key in values if key not in hints]
    problems = problems + [f"`{key}` is no field of {cls.__name__}{_meant(str(key), list(hints))}" for key in unknown]
    required = {f.name for f in dataclasses.fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    asked = [name for name in hints if name in values or name in required]
    for name in asked:
        nested = dataclasses.is_dataclass(hints[name])
        value = values.get(name, {} if nested else MISSING)
        if value is MISSING:
            problems.append(f"`{name}` is missing; give it a value ({inspect.formatannotation(hints[name])})")
        elif nested and isinstance(value, dict):
            try:
                ready[name] = _build(hints[name], value, [])
            except ConfigError as error:
                problems += [line.replace("`", f"`{name}.", 1) for line in error.problems]
        else:
            ready[name] = value
    ready, wrong = _typed(cls, ready)
    problems += wrong
    if len(ready) == len(asked):
        try:
            made = cls(**ready)
            if not problems:
                return made
        except ConfigError as error:
            problems += error.problems
    raise ConfigError(cls.__name__, problems)


def _typed(cls: type, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`values` as the types that the fields of `cls` ask for, and a line for each that is something else."""
    ready, wrong, hints = {}, [], get_type_hints(cls)
    for name, value in values.items():
        try:
            ready[name] = _read(value, hints[name])
        except ValueError:
            wrong.append(f"`{name}` is {value!r}; allowed: {inspect.formatannotation(hints[name])}")
    return ready, wrong


def _read(value: Any, annotation: Any) -> Any:
    """`value` as the type that `annotation` names; ValueError when it is not one."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for option in options:
            try:
                return _read(value, option)
            except ValueError:
                continue
    elif origin is list and isinstance(value, (list, tuple)):
        return [_read(item, options[0]) for item in value]
    elif origin is Literal and value in options:
        return value
    elif annotation is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # Text too: YAML 1.1 reads `1e-4` as text, it wants `1.0e-4`.
        if not math.isnan(float(value)):
            return float(value)
    elif type(value) is annotation:
        return value
    raise ValueError


def _from_words(words: list[str], annotation: Any) -> Any:
    """The words behind a flag as the plain value that YAML would have given; `_read` then judges it."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    items = [get_args(option)[0] for option in options if get_origin(option) is list]
    single = [option for option in options if get_origin(option) is not list]
    text = ",".join(words)
    if text.lower() in ("none", "null") and types.NoneType in single:
        return None
    if items and (set(single) <= {types.NoneType} or "," in text):
        parts = text.removeprefix("[").removesuffix("]").split(",")
        return [_from_words([part.strip()], items[0]) for part in parts if part.strip()]
    if bool in single and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if int in single and re.fullmatch(r"[+-]?\d+", text) else text


def _flat_fields(cls: type, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """`name.of.field -> (annotation, help text)` for a dataclass and those nested in it."""
    texts = dict(re.findall(r"^ +(\w+): (.+)$", inspect.getdoc(cls), re.MULTILINE))
    found, hints = {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= _flat_fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            default = "" if field.default is MISSING else f"; default {field.default}".lower()
            found[prefix + field.name] = (hints[field.name], f"{texts.get(field.name, '')}{default}".replace("%", "%%"))
    return found


def _meant(word: str, names: list[str]) -> str:
    """What was probably meant, else what there is."""
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; there are: {', '.join(names)}"
