"""What training minimises: pure functions of tensors, one value per position; the caller masks, weights and sums.

Letters: N positions, V vocabulary entries, C candidate entries, E exits, L decoder blocks.

The vocabulary is the expensive axis, so a loss sees logits for *candidate* entries only: every entry that the full
model ranks in its top k anywhere in the step, and a random sample of the others that stands for all of them. With
every entry a candidate the same functions are exact; `in_chunks` then keeps memory at [chunk, V].
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DIVERGENCES = ("forward", "reverse", "js", "tv")
# Beyond 20 to 1 a balanced class would be a handful of positions per step, shouting.
MAX_CLASS_WEIGHT = 10.0


def candidates(
    top_ids: Tensor,
    vocab_size: int,
    negatives: int | None,
    generator: torch.Generator | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Vocabulary entries that stand for the whole vocabulary in one step, and the log of how many each stands for.

    Entries in `top_ids` and `labels` stand for themselves. The other R are represented by `negatives` of them, drawn
    uniformly without replacement, each standing for R / negatives: sums over the vocabulary (a softmax normaliser, a
    divergence's terms) are then estimated without bias, and exactly when negatives >= R.
    Horvitz and Thompson 1952, "A Generalization of Sampling Without Replacement From a Finite Universe", section 3,
    used on a softmax as in Jean et al. 2015, "On Using Very Large Target Vocabulary for NMT", section 3; here the
    likely entries are kept whole and only the tail is estimated. What stays approximate is the logarithm of a
    normaliser: low by half the squared relative error of its estimate.

    Args:
        top_ids: entries that must be in, any shape, e.g. the full model's top k as [N, k].
        vocab_size: V.
        negatives: how many of the other entries to draw; `None` takes them all, which is exact.
        generator: explicit source of randomness; two processes with the same seed draw nearly the same entries.
        labels: further entries that must be in, any shape; negative ones (ignored positions) are dropped.

    Returns:
        ids [C], ascending, and log_weight [C], float32, both on the device of `top_ids`.
    """
    kept = torch.zeros(vocab_size, dtype=torch.bool, device=top_ids.device)
    kept[top_ids.flatten()] = True
    if labels is not None:
        kept[labels[labels >= 0]] = True
    num_rest = vocab_size - int(kept.sum())
    log_weight = torch.zeros(vocab_size, device=top_ids.device)
    if negatives is None or negatives >= num_rest:
        return torch.arange(vocab_size, device=top_ids.device), log_weight
    # One permutation of the whole vocabulary, then a filter: processes whose top entries differ still share the draw.
    device = top_ids.device if generator is None else generator.device
    order = torch.randperm(vocab_size, generator=generator, device=device).to(top_ids.device)
    drawn = order[~kept[order]][:negatives]
    if negatives:
        log_weight[drawn] = math.log(num_rest / negatives)
    kept[drawn] = True
    ids = kept.nonzero().squeeze(1)
    return ids, log_weight[ids]


def divergence(
    teacher: Tensor,
    student: Tensor,
    kind: str = "forward",
    log_weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence between two next-token distributions at each position, nats, [N].

    "forward" is KL(teacher || student), "reverse" KL(student || teacher) (Gu et al. 2024, "MiniLLM", section 2), "js"
    Jensen-Shannon (Lin 1991, "Divergence Measures Based on the Shannon Entropy", section 4), "tv" total variation, in
    [0, 1]: the share of drafts that a sampling judge turns down (Leviathan et al. 2023, "Fast Inference from
    Transformers via Speculative Decoding", corollary 3.6). To compare on a shortlist, hand in its columns only: both
    sides are renormalised over them.

    At a temperature T both sides are softmax(logits / T), and the result is multiplied by T^2, so that its gradients
    do not fade as 1 / T^2: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.1. The default
    is none (Jamialahmadi et al. 2025, "Balcony"). "tv" is of first order in the logits' difference, which T^2 would not
    undo: no temperature there.

    Args:
        teacher: the full model's logits, [N, C]; hand in a detached tensor.
        student: the exit's logits for the same entries, [N, C].
        kind: "forward", "reverse", "js" or "tv".
        log_weight: [C] from `candidates`; `None` when every entry is there.
        temperature: T, above 0; 1 for "tv".

    Raises:
        ValueError: `kind` is none of these.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"`divergence` is {kind!r}; it can be {', '.join(DIVERGENCES)}; choose one of these.")
    assert temperature == 1 or kind != "tv", "LossConfig refuses a temperature for the total variation"
    teacher_log, student_log = (_log_softmax(logits, log_weight, temperature) for logits in (teacher, student))
    if kind == "tv":
        return 0.5 * (teacher_log.exp() - student_log.exp()).abs().sum(-1)
    if kind == "forward":
        out = _kl(teacher_log, student_log)
    elif kind == "reverse":
        out = _kl(student_log, teacher_log)
    else:
        middle_log = torch.logaddexp(teacher_log, student_log) - math.log(2)
        out = 0.5 * (_kl(teacher_log, middle_log) + _kl(student_log, middle_log))
    return temperature**2 * out


def cross_entropy(student: Tensor, target: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Negative log-probability of the target entry at each position, nats, [N].

    Args:
        student: logits, [N, C].
        target: column of the wanted entry, [N]; `torch.searchsorted(ids, labels)` for ids from `candidates` that were
            given these labels, the labels themselves when every entry is a candidate.
        log_weight: [C] from `candidates`; `None` when every entry is there.
    """
    return -_log_softmax(student, log_weight).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def hidden_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared distance of an exit's normed state from the full model's, as a share of the latter's square, [N].

    States instead of what is said of them: Romero et al. 2015, "FitNets", section 2.1, equation 3.

    Args:
        teacher: the full model's normed states, [N, hidden]; hand in a detached tensor.
        student: the exit's, [N, hidden].
    """
    teacher, student = teacher.float(), student.float()
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


def in_chunks(function: Callable[..., Tensor], *states: Tensor, chunk: int = 256) -> Tensor:
    """`function(*states)` worked out for `chunk` positions at a time, [..., N].

    What `function` makes inside (logits, [chunk, V]) is not kept for the backward pass but made again there, so
    neither pass holds [N, V]. Sublinear memory by recomputation: Chen et al. 2016, "Training Deep Nets with Sublinear
    Memory Cost", section 4.

    Args:
        function: takes one [n, ...] slice of every state and returns [..., n]; it draws nothing at random.
        *states: tensors with the position first, [N, ...].
        chunk: positions at a time.
    """
    pieces = zip(*(state.split(chunk) for state in states), strict=True)
    done = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.cat(done, dim=-1)


def regret(logits: Tensor, chosen: Tensor) -> Tensor:
    """How much less likely than its best token the full model finds the chosen one, nats, [N]; 0 is its own choice.

    Args:
        logits: the full model's logits (or log-probabilities) on the same prefix, [N, V].
        chosen: the token that the exit would emit, [N].
    """
    logits = logits.float()
    return logits.amax(-1) - logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def harm(regret: Tensor, tolerance: float) -> Tensor:
    """Whether emitting that token does harm: its regret is more than `tolerance` nats, bool, [N]."""
    return regret > tolerance


def class_weights(prior: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (of harm, of no harm) with which both classes pull on a gate equally; each at most `MAX_CLASS_WEIGHT`.

    A class with frequency f gets 1 / (2 f), so the mean weight is 1 until the limit bites (at 5 %). A class that was
    never seen gets the limit: nothing while it is absent, and no infinity when its first position comes.

    Args:
        prior: frequency of "no harm" at this exit, in [0, 1], 0-dim (or one per exit).
    """
    harmful = (0.5 / (1 - prior)).clamp(max=MAX_CLASS_WEIGHT)
    harmless = (0.5 / prior).clamp(max=MAX_CLASS_WEIGHT)
    return harmful, harmless


def gate_loss(gate_logit: Tensor, no_harm: Tensor, prior: Tensor) -> Tensor:
    """Class-balanced binary cross-entropy of a gate at each position, nats, [N].

    Not reduced, so that it is summed and divided by the step's tokens like every other term: eight batches of one then
    follow one batch of eight. Balanced per exit like the early-exit classifier of Schuster et al. 2022, "Confident
    Adaptive Language Modeling", section 3 and code.

    Args:
        gate_logit: [N], computed from a detached state: a gate must not bend its exit.
        no_harm: target, bool, [N]; from the exit as it is now.
        prior: frequency of "no harm" at this exit, 0-dim: a running mean, or this batch's own frequency.
    """
    harmful, harmless = class_weights(prior)
    target = no_harm.to(gate_logit.dtype)
    loss = F.binary_cross_entropy_with_logits(gate_logit, target, reduction="none")
    return loss * torch.where(no_harm, harmless, harmful)


def prior_shift(prior: Tensor) -> Tensor:
    """What to add to a gate's logit so that its sigmoid is a probability again, 0-dim (or one per exit).

    `gate_loss` with weights (w_harm, w_none) has its minimum at logit(P(no harm)) + log(w_none / w_harm): balancing
    teaches the gate a world in which both classes are equally frequent. This takes the world as it is back in: logit
    adjustment after training, Menon et al. 2021, "Long-tail Learning via Logit Adjustment", section 4, used here the
    other way round. The order of scores at one exit is not touched.

    Args:
        prior: the one that `gate_loss` was given.
    """
    harmful, harmless = class_weights(prior)
    return (harmful / harmless).log()


def calibration_error(scores: Tensor, targets: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error of scores as probabilities, 0-dim in [0, 1]; 0 when there is nothing to judge.

    Mean distance between score and frequency over equally wide bins, weighted by their share: Guo et al. 2017, "On
    Calibration of Modern Neural Networks", section 2, equation 3.

    Args:
        scores: in [0, 1], [N].
        targets: what came true, bool or 0/1, [N].
        bins: number of bins.
    """
    scores = scores.float()
    index = (scores * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, device=scores.device).index_add_(0, index, targets.to(scores.dtype) - scores)
    return gaps.abs().sum() / max(len(scores), 1)


def layer_dropout_rates(num_layers: int, p_max: float) -> list[float]:
    """Probability of skipping each block in one training step, [L]: 0 for the first, `p_max` for the last.

    p(l) = p_max * D(l), D(l) = exp(l ln 2 / (L - 1)) - 1: Elhoushi et al. 2024, "LayerSkip", section 4.1.1; constant
    over time, which is their choice for a pretrained model.
    """
    return [p_max * (2 ** (layer / max(num_layers - 1, 1)) - 1) for layer in range(num_layers)]


def rotational(step: int, num_exits: int) -> list[bool]:
    """Which exits take part in the loss of a step, [E]: one, and the next one in the next step.

    Rotational curriculum with as many groups as exits: Elhoushi et al. 2024, "LayerSkip", section 4.1.2.
    """
    return [step % num_exits == exit_index for exit_index in range(num_exits)]


def gradual(step: int, steps: int, num_exits: int) -> list[bool]:
    """Which exits take part in the loss of a step of a run of `steps`, [E]: the deepest, one more after each 2E-th.

    Gradual curriculum: Elhoushi et al. 2024, "LayerSkip", section 4.1.2, with exits in place of all layers.
    """
    return [num_exits - 1 - exit_index <= 2 * num_exits * step // steps for exit_index in range(num_exits)]


def _log_softmax(logits: Tensor, log_weight: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Log-mass of what each column stands for; at least float32, whatever comes in."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature  # before the weights: a column stands for as many entries at any temperature
    return F.log_softmax(logits if log_weight is None else logits + log_weight, dim=-1)


def _kl(first_log: Tensor, second_log: Tensor) -> Tensor:
    """KL(first || second) over the last dimension. A column's weight is in both and cancels in the difference."""
    return (first_log.exp() * (first_log - second_log)).sum(-1)
