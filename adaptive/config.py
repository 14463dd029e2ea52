"""What can be set: where exits are and what they are made of, what they are trained towards, how a run goes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from adaptive.checked import Checked, ConfigError, build

Head = Literal["norm", "linear", "mlp", "linear_mlp", "block"]
Gate = Literal["linear", "mlp", "max_prob", "margin", "entropy", "similarity"]
COMPARING = ("max_prob", "margin", "entropy")  # gates that read the logits of a head


@dataclass
class ExitConfig(Checked):
    """Where the exits are and what each is made of. A single value counts for every exit, a list has one per exit.

    Attributes:
        depths: number of decoder blocks run before each exit, ascending
        head: state -> logits: own norm (norm), low-rank adapter (linear), gated MLPs (mlp), the one and then the other
            (linear_mlp), decoder blocks (block)
        rank: rank of the adapter in a linear or linear_mlp head
        layers: number of MLPs or decoder blocks in an mlp, linear_mlp or block head
        head_kv: keys and values that a block head attends to: its own, or the backbone's at that depth (shared)
        shortlist: number of vocabulary entries that a head reads; none = all of them
        screen: rank of a preview of the LM head that picks each token's shortlist; none = one list, of frequent entries
        gate: state -> score: trained (linear, mlp) or a baseline (max_prob, margin, entropy, similarity)
        fill: keys and values of skipped blocks: by a map fitted to what these would have made of the state (fitted), or
            by their own weights (projected), as where they are of a form that no map is known for
        blocks: dotted path of the backbone's list of decoder blocks; none = found by itself
    """

    depths: list[int]
    head: Head | list[Head] = "linear"
    rank: int = 64
    layers: int = 1
    head_kv: Literal["own", "shared"] = "own"
    shortlist: int | None | list[int | None] = None
    screen: int | None = None
    gate: Gate = "linear"
    fill: Literal["fitted", "projected"] = "fitted"
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
        found += self._below(1, "rank", "layers", "screen")
        if self.screen is not None and not any(self.per_exit("shortlist")):
            found.append(f"`screen` is {self.screen} but no exit has a `shortlist` for it to pick; set one, e.g. 1024")
        if any(size is not None and size < 1 for size in self.per_exit("shortlist")):
            found.append(f"`shortlist` is {self.shortlist}; each must be at least 1 entry, or none for all entries")
        if self.gate in COMPARING and 1 in self.per_exit("shortlist"):
            found.append(f"`shortlist` is {self.shortlist}; `gate` {self.gate!r} compares entries: give it 2 at least")
        if self.head_kv == "shared" and "block" not in self.per_exit("head"):
            found.append(f"`head_kv` is 'shared' but `head` is {self.head!r}; only a 'block' head has keys and values")
        shallow = [d for d, h in zip(self.depths, self.per_exit("head")) if h == "block" and d < self.layers]
        if self.head_kv == "shared" and shallow:
            found.append(
                f"`layers` is {self.layers}; a block head with `head_kv` 'shared' at {shallow} `depths` finds keys and "
                "values of no more blocks than that"
            )
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
        if self.layers > num_layers and {"block", "mlp", "linear_mlp"} & set(self.per_exit("head")):
            found.append(f"`layers` is {self.layers}; heads are copied from the backbone's {num_layers} blocks")
        if found:
            raise ConfigError("ExitConfig", found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExitConfig:
        """The configuration that `to_dict` wrote; ValueError names all unknown keys and faulty values."""
        return build(cls, values, [])


@dataclass
class LossConfig(Checked):
    """What an exit is trained towards.

    Attributes:
        divergence: of the exit from the full model: KL from full to exit (forward), exit to full (reverse), js, or the
            total variation (tv)
        temperature: that both sides' logits are divided by in a divergence other than tv, which its square multiplies;
            it softens both distributions above 1, and sharpens them below
        cross_entropy: weight of the labels' cross-entropy beside the divergence
        hidden: weight of the squared distance of an exit's normed state from the full model's, over the latter's square
        weights: weight of each exit in the sum; none = equal
        top_k: number of the teacher's likeliest entries in the distillation
        negatives: number of random vocabulary entries beside them, shared by a step; none = the exact sum, in chunks
        tolerance: regret in nats up to which a token does no harm; the gates' target
        final: weight of the full depth's own distillation term (modes lora and full)
        layer_dropout: largest probability of skipping a block in training, reached at the last block
        curriculum: which of the exits that weigh anything take part in a step: all of them (none), one in turn
            (rotational), or the deepest first and the others one by one until half of the steps are done (gradual)
    """

    divergence: Literal["forward", "reverse", "js", "tv"] = "forward"
    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0
    weights: list[float] | None = None
    top_k: int = 16
    negatives: int | None = 2048
    tolerance: float = 0.25
    final: float = 1.0
    layer_dropout: float = 0.0
    curriculum: Literal["rotational", "gradual"] | None = None

    def problems(self) -> list[str]:
        """One line for each fault."""
        found = self._below(0, "cross_entropy", "hidden", "tolerance", "final") + self._below(1, "top_k", "negatives")
        if self.weights is not None and (not self.weights or min(self.weights) < 0 or sum(self.weights) == 0):
            found.append(f"`weights` is {self.weights}; none may be negative and one must be above 0")
        if not 0 < self.temperature < math.inf:
            found.append(f"`temperature` is {self.temperature}; it must be above 0")
        elif self.temperature != 1 and self.divergence == "tv":
            found.append(
                f"`temperature` is {self.temperature} with `divergence` tv, whose gradients its square would not keep "
                "alike; leave it at 1, or choose forward, reverse or js"
            )
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
        states: folder that keeps what a frozen backbone makes of the data, for later passes and runs; none = run it
        mode: what moves: the exits (frozen), also adapters on the backbone (lora), or all weights (full)
        lora_rank: rank of the adapters in mode lora
        lora_modules: names of the layers that get adapters, e.g. q_proj; none = all linear ones
        lora_blocks: number of first blocks that get adapters; none = all of them
        exits: where the exits are and what they are made of
        loss: what they are trained towards
        sequence_length: tokens per sequence
        batch_size: sequences per device and forward pass
        accumulate: forward passes per optimizer step
        steps: optimizer steps of the exits; gates are fitted to them afterwards
        gate_tokens: labelled tokens that gates are fitted to, where there are so many
        fill_tokens: labelled tokens that keys and values of skipped blocks are fitted to
        learning_rate: the largest of the schedule
        backbone_rate: the largest of adapters or backbone; none = a tenth (lora) or a hundredth (full) of learning_rate
        gradient_checkpointing: recompute activations in the backward pass, for less memory
        eval_every: optimizer steps from one evaluation to the next
        seed: of initial values, data order and sampling
        log_with: tracker known to accelerate (wandb, tensorboard, ...); none = off
    """

    model: str = "smollm2-135m-instruct"
    data: list[str]
    output: str
    states: str | None = None
    mode: Literal["frozen", "lora", "full"] = "frozen"
    lora_rank: int = 16
    lora_modules: list[str] | None = None
    lora_blocks: int | None = None
    exits: ExitConfig
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    sequence_length: int = 256
    batch_size: int = 8
    accumulate: int = 1
    steps: int
    gate_tokens: int = 131072  # 16,384, 32,768 and 75,000 gave 0.789, 0.783 and 0.774 of the FLOPs at 2 % harm
    fill_tokens: int = 16384  # 8,000, 16,000, 26,000 leave 0.27, 0.24, 0.23 of the variance behind 14 of 30 blocks
    learning_rate: float = 1e-3
    backbone_rate: float | None = None
    gradient_checkpointing: bool = False
    eval_every: int = 50
    seed: int = 0
    log_with: str | None = None

    def problems(self) -> list[str]:
        """One line for each fault, those that `exits` and `loss` have together included."""
        found = self._below(1, "lora_rank", "lora_blocks", "batch_size", "accumulate", "steps", "eval_every")
        found += self._below(1, "gate_tokens", "fill_tokens")
        found += self._below(2, "sequence_length") + self._below(0, "seed")
        if not self.data:
            found.append("`data` is empty; name at least one folder, file or data set")
        for name in ("learning_rate", "backbone_rate"):
            if (rate := getattr(self, name)) is not None and not 0 < rate < math.inf:
                found.append(f"`{name}` is {rate}; it must be above 0")
        if self.states and (self.mode != "frozen" or self.exits.head_kv == "shared"):
            found.append(f"`states` is {self.states!r}; leave it out, or set mode frozen and head_kv own")
        if (weights := self.loss.weights) is not None and len(weights) != len(self.exits.depths):
            found.append(f"`loss.weights` has {len(weights)} entries for {len(self.exits.depths)} exits; give one each")
        return found
