"""The joint loss: every exit against the full model, every gate against its exit, the full depth against itself.

One pass over the backbone gives the states at all exits and at full depth. Exits never see the whole vocabulary at
once: they are compared on candidate entries (see `losses.candidates`), or exactly, a chunk of positions at a time.
Gates read detached states, and their target follows the exit as it is now; while training, an exit is taken to say its
best candidate. Once exits stand still, `gates.fit_gates` trains gates further on what
`gate_examples` finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive import losses
from adaptive.backbone import Backbone
from adaptive.exits import Exits
from adaptive.kv import SharedKV, TrainingKV, replace_cache

CHUNK = 256, 4096  # positions whose logits over the whole vocabulary are held at once, on a CPU and elsewhere
GATE_SHARE = 8  # while exits move, gates learn from one column of tokens in this many
PRIOR_PACE = 0.05  # of the running frequency of "no harm"


@dataclass
class Targets:
    """What the full model says at the N labelled positions of a batch.

    Attributes:
        keep: [batch, tokens - 1] bool, which positions are labelled.
        normed: [N, hidden], the full model's normed state.
        top: [N, k], its best vocabulary entries.
        labels: [N], the wanted entries.
    """

    keep: Tensor
    normed: Tensor
    top: Tensor
    labels: Tensor

    def pick(self, states: Tensor) -> Tensor:
        """Returns the labelled positions [N, hidden] of states [batch, tokens, hidden]."""
        return states[:, :-1][self.keep]


def full_states(
    view: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    depths: tuple[int, ...],
    cache: TrainingKV | None = None,
    drop: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, list]:
    """Returns the states [batch, tokens, hidden] at `depths`, the normed state at full depth, and the block calls."""
    hidden, calls = view.start(input_ids, attention_mask, _positions(attention_mask), cache)
    states, depth = [], 0
    for exit_depth in depths:
        hidden, depth = view.run(hidden, calls, depth, exit_depth, drop), exit_depth
        states.append(hidden)
    return states, view.norm(view.run(hidden, calls, depth, view.num_layers, drop)), calls


def _positions(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def tops(view: Backbone, normed: Tensor, k: int) -> Tensor:
    """Returns the full model's best k vocabulary entries [N, k] for normed states [N, hidden], best first."""
    chunks = [view.logits(chunk).topk(min(k, view.vocab_size)).indices for chunk in normed.split(_chunk(normed))]
    return torch.cat(chunks)


def _chunk(states: Tensor) -> int:
    return CHUNK[states.device.type != "cpu"]


def exit_features(
    view: Backbone, exits: Exits, index: int, depth: int, state: Tensor, calls: list, cache: TrainingKV | None
) -> Tensor:
    """Returns an exit's normed state [batch, tokens, hidden] in a teacher-forced pass."""
    head = exits.heads[index]
    if head.kind != "block":
        return head(state)
    shared = None if exits.config.head_kv == "own" else SharedKV(cache, view.num_layers - depth)
    return head(state, [replace_cache(call, cache, shared) for call in calls] if cache is not None else calls)


def joint_loss(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    num_items: Tensor | int | None,
    states: Tensor | None = None,
    top: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss (0-dim, nats per labelled position) and detached metrics per exit.

    Args:
        model: the `EarlyExitModel`; its mode says who learns, its `step` and `seed` what is drawn at random.
        input_ids, attention_mask, labels: [batch, tokens]; labels as in transformers, -100 where nothing is wanted.
        num_items: labelled positions of the whole optimizer step, over which the sum is taken; None for this
        batch's own.
    """
    view, exits, config = model.view, model.exits, model.loss_config
    generator = torch.Generator(input_ids.device).manual_seed((model.seed * 1_000_003 + model.step) % 2**63)
    cache = TrainingKV(view.num_layers) if exits.shares_kv else None
    frozen = model.mode == "frozen"
    states, final, calls = _backbone_pass(model, input_ids, attention_mask, cache, generator, states)
    teacher = final if frozen else model.teacher_states(input_ids, attention_mask)
    if not (labels[:, 1:] != -100).any():
        return _nothing(model), {}
    targets = _targets(model.teacher_view, teacher, labels, config.top_k, top)
    count = len(targets.normed)
    total = count if num_items is None else num_items
    ids, log_weight = losses.candidates(
        targets.top, view.vocab_size, config.negatives, generator, targets.labels if config.cross_entropy else None
    )
    compare = _Comparison(view, model.teacher_view, targets, config, ids, log_weight)
    weights = _weights(model, config)
    metrics, loss = {}, final.new_zeros((), dtype=torch.float32)
    picked = _gate_positions(targets.keep, model)
    scale = GATE_SHARE if model.training else 1
    pace = PRIOR_PACE * min(float(count / total), 1.0) if model.training else 0.0
    stay, expected = torch.ones(len(picked), device=final.device), torch.zeros(len(picked), device=final.device)
    for index, depth in enumerate(model.depths):
        normed = targets.pick(exit_features(view, exits, index, depth, states[index], calls, cache))
        if weights[index] or not model.training:
            exit_loss = compare(normed).sum()
            loss = loss + weights[index] * exit_loss / total
            metrics[f"exit_{depth}/loss"] = exit_loss.detach() / count
        with torch.no_grad():
            said = exits.said(view, index, normed[picked], _chunk(normed), ids if model.training else None)
        gate_loss, scores = _gate_loss(model, index, targets, states[index], said, picked, pace, metrics)
        loss = loss + gate_loss * scale / total
        expected, stay = expected + stay * scores * depth, stay * (1 - scores)
    if len(picked):
        metrics["expected_depth"] = (expected + stay * view.num_layers).mean()
    if not frozen:
        own = compare(targets.pick(final)).sum()
        metrics["final/kl"] = own.detach() / count
        loss = loss + config.final * own / total
    return loss, metrics


@torch.no_grad()
def gate_examples(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    states: Tensor | None = None,
    top: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns what gates read at the N labelled positions, states [N, exits, hidden], and whether leaving there does no
    harm, bool [N, exits]. The arguments are those of `joint_loss`.

    An exit is taken to say its best candidate (`losses.candidates`), which makes one label in a hundred too kind and
    finds them all twenty times sooner: gates want many more labels, not better ones.
    """
    view, exits, config = model.view, model.exits, model.loss_config
    cache = TrainingKV(view.num_layers) if exits.shares_kv else None
    at_exits, final, calls = _backbone_pass(model, input_ids, attention_mask, cache, None, states)
    teacher = final if model.mode == "frozen" else model.teacher_states(input_ids, attention_mask)
    targets, no_harm = _targets(model.teacher_view, teacher, labels, config.top_k, top), []
    generator = torch.Generator(input_ids.device).manual_seed(model.seed)
    among, _ = losses.candidates(targets.top, view.vocab_size, config.negatives, generator)
    every = torch.arange(len(targets.normed), device=final.device)
    for index, depth in enumerate(model.depths):
        normed = targets.pick(exit_features(view, exits, index, depth, at_exits[index], calls, cache))
        no_harm.append(_does_no_harm(model, targets, every, exits.said(view, index, normed, _chunk(normed), among)))
    return torch.stack([targets.pick(state) for state in at_exits], 1), torch.stack(no_harm, 1)


def _does_no_harm(model, targets: Targets, picked: Tensor, said: Tensor) -> Tensor:
    """Returns for positions [n] whether the full model likes what was said there nearly as well as its own word."""
    normed, view = targets.normed[picked], model.teacher_view
    lost = view.logit_of(normed, targets.top[picked, 0]) - view.logit_of(normed, said)
    return ~losses.harm(lost, model.loss_config.tolerance)


def _backbone_pass(
    model, input_ids: Tensor, attention_mask: Tensor | None, cache: TrainingKV | None, generator, kept: Tensor | None
) -> tuple[list[Tensor], Tensor, list]:
    """Returns what `full_states` does, under the model's mode; `kept`: states that `states.with_states` has found."""
    view, frozen = model.view, model.mode == "frozen"
    if kept is not None:
        assert frozen and cache is None, "kept states are those of a frozen backbone, and no K/V are kept with them"
        *states, final = kept.unbind(2)
        return states, final, view.start(input_ids, attention_mask, _positions(attention_mask), None)[1]
    drop, learns = None, model.training and not frozen
    if learns:
        p_max = model.loss_config.layer_dropout
        drop = _dropped(view.num_layers, len(input_ids), p_max, generator, input_ids.device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        return full_states(view, input_ids, attention_mask, model.depths, cache, drop)


class _Comparison:
    """Divergence (cross-entropy, distance) of an exit from the full model at every labelled position."""

    def __init__(
        self, view: Backbone, teacher_view: Backbone, targets: Targets, config, ids: Tensor, log_weight: Tensor
    ):
        self.view, self.teacher_view, self.targets, self.config = view, teacher_view, targets, config
        self.ids, self.log_weight = ids, log_weight
        self.exact = len(ids) == view.vocab_size
        if not self.exact:
            with torch.no_grad():
                self.teacher = teacher_view.logits(targets.normed, ids)

    def __call__(self, normed: Tensor) -> Tensor:
        """Returns the loss per position [N] of an exit's normed states [N, hidden]."""
        out = self._compared(normed)
        if self.config.hidden:
            out = out + self.config.hidden * losses.hidden_distance(self.targets.normed, normed)
        return out

    def _compared(self, normed: Tensor) -> Tensor:
        if self.exact:
            wanted = self.targets.normed, self.targets.labels
            return losses.in_chunks(self._whole, normed, *wanted, chunk=_chunk(normed))
        return self._loss(self.view.logits(normed, self.ids), self.teacher, self.targets.labels, self.ids)

    def _whole(self, normed: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher_view.logits(teacher)
        return self._loss(self.view.logits(normed), wanted, labels, None)

    def _loss(self, student: Tensor, teacher: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        weight = None if ids is None else self.log_weight
        out = losses.divergence(teacher, student, self.config.divergence, weight, self.config.temperature)
        if self.config.cross_entropy:
            columns = labels if ids is None else torch.searchsorted(ids, labels)
            out = out + self.config.cross_entropy * losses.cross_entropy(student, columns, weight)
        return out


@torch.no_grad()
def _targets(view: Backbone, normed: Tensor, labels: Tensor, top_k: int, top: Tensor | None) -> Targets:
    keep = labels[:, 1:] != -100
    picked = normed[:, :-1][keep]
    best = tops(view, picked, top_k) if top is None else top[:, :-1][keep]
    return Targets(keep, picked, best, labels[:, 1:][keep])


def _weights(model, config) -> list[float]:
    weights = config.weights or [1.0] * len(model.depths)
    mean = sum(weights) / len(weights)
    on = set(range(len(weights)))
    if config.curriculum and model.training:
        learning = [index for index, weight in enumerate(weights) if weight]  # the others would waste their turn
        if config.curriculum == "rotational":
            turn = losses.rotational(model.step, len(learning))
        else:
            turn = losses.gradual(model.step, model.steps, len(learning))
        on = {index for index, is_on in zip(learning, turn, strict=True) if is_on}
    return [weight / mean / len(weights) * (index in on) for index, weight in enumerate(weights)]


def _dropped(layers: int, batch: int, p_max: float, generator: torch.Generator, device) -> Tensor | None:
    if not p_max:
        return None
    rates = torch.tensor(losses.layer_dropout_rates(layers, p_max), device=device)
    return torch.rand(layers, batch, generator=generator, device=device) < rates[:, None]


def _gate_positions(keep: Tensor, model) -> Tensor:
    """Returns the labelled positions [n] that gates learn from: in training every `GATE_SHARE`th column, another one in
    each step; so micro-batches see what the whole batch would."""
    if not model.training:
        return torch.arange(int(keep.sum()), device=keep.device)
    columns = (torch.arange(keep.shape[1], device=keep.device) + model.step) % GATE_SHARE == 0
    return (keep & columns)[keep].nonzero()[:, 0]


def _gate_loss(
    model, index: int, targets: Targets, states: Tensor, said: Tensor, picked: Tensor, pace: float, metrics: dict
) -> tuple[Tensor, Tensor]:
    """Returns the summed loss of one gate and its scores [n]; writes the exit's agreement and the gate's metrics.

    Args:
        states: [batch, tokens, hidden] at the exit's depth.
        said: [n], what the exit says at the picked positions.
        picked: [n], of the labelled positions.
        pace: share by which the running frequency of "no harm" moves to this batch's; 0 leaves it.
    """
    gate, depth = model.exits.gates[index], model.depths[index]
    state = targets.pick(states)[picked].detach()
    none = state.new_zeros(len(state), dtype=torch.float32)
    if not len(state):
        return none.sum(), none
    with torch.no_grad():
        no_harm = _does_no_harm(model, targets, picked, said)
        metrics[f"exit_{depth}/agreement"] = (said == targets.top[picked, 0]).float().mean()
        metrics[f"exit_{depth}/no_harm"] = no_harm.float().mean()
    if not gate.learned:
        return none.sum(), none
    if pace:
        gate.prior.lerp_(no_harm.float().mean().clamp(0.001, 0.999), pace)
    loss = losses.gate_loss(gate(state), no_harm, gate.prior)
    with torch.no_grad():
        scores = gate.score(state)
        metrics[f"exit_{depth}/gate_loss"] = loss.detach().mean()
        metrics[f"exit_{depth}/gate_ece"] = losses.calibration_error(scores, no_harm)
    return loss.sum(), scores


def _nothing(model) -> Tensor:
    """Returns a loss of 0 that every trainable parameter takes part in, for a batch without a label."""
    return sum((p.sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros(()))
