"""The losses against references, against the exact loss that they approximate, and against hand-made numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB

from adaptive import EarlyExitModel, ExitConfig, losses
from adaptive.config import LossConfig

torch.set_num_threads(1)
N, H, V, K = 48, 16, 2000, 16
SOFTENED = [("forward", 0.5), ("forward", 2.0), ("reverse", 2.0), ("js", 3.0)]
KINDS = [*((kind, 1.0) for kind in losses.DIVERGENCES), *SOFTENED]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def peaked_logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher and student logits [N, V] as sharp as a language model's: about 3 nats of entropy over 2000 entries."""
    generator = seeded(seed)
    teacher = 3.0 * torch.randn(N, V, generator=generator)
    return teacher, teacher + 1.5 * torch.randn(N, V, generator=generator)


def on_candidates(teacher, student, negatives, seed, kind="forward", temperature=1.0):
    top_ids = teacher.topk(K, dim=-1).indices
    ids, log_weight = losses.candidates(top_ids, V, negatives, seeded(seed))
    return losses.divergence(teacher[:, ids], student[:, ids], kind, log_weight, temperature)


def test_candidates_are_the_top_entries_the_labels_and_the_drawn():
    top_ids, labels = torch.tensor([[3, 5], [5, 9]]), torch.tensor([-100, 40, 3])
    ids, log_weight = losses.candidates(top_ids, 100, 8, seeded(0), labels)
    assert ids.tolist() == sorted(set(ids.tolist()))
    assert {3, 5, 9, 40} <= set(ids.tolist()) and len(ids) == 4 + 8
    own = torch.isin(ids, torch.tensor([3, 5, 9, 40]))
    assert (log_weight[own] == 0).all()
    torch.testing.assert_close(log_weight[~own], torch.full((8,), math.log(96 / 8)))
    # The weights count the vocabulary: 4 + 8 * 96 / 8.
    torch.testing.assert_close(log_weight.exp().sum(), torch.tensor(100.0))


@pytest.mark.parametrize("negatives", [None, 98, 500])
def test_all_negatives_are_the_whole_vocabulary(negatives):
    ids, log_weight = losses.candidates(torch.tensor([[1, 7]]), 100, negatives, seeded(0))
    assert ids.tolist() == list(range(100)) and not log_weight.any()


def test_no_negatives_is_the_top_entries_alone():
    ids, log_weight = losses.candidates(torch.tensor([[1, 7]]), 100, 0, seeded(0))
    assert ids.tolist() == [1, 7] and not log_weight.any()


def test_two_processes_draw_nearly_the_same_negatives():
    first = losses.candidates(torch.tensor([[3, 5]]), 1000, 50, seeded(7))[0]
    second = losses.candidates(torch.tensor([[5, 9]]), 1000, 50, seeded(7))[0]
    assert len(set(first.tolist()) & set(second.tolist())) >= 49
    assert losses.candidates(torch.tensor([[3, 5]]), 1000, 50, seeded(8))[0].tolist() != first.tolist()


@pytest.mark.parametrize("kind, temperature", KINDS)
def test_divergence_is_the_reference(kind, temperature):
    teacher, student = peaked_logits()
    p, q = (torch.distributions.Categorical(logits=logits / temperature) for logits in (teacher, student))
    middle = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
    kl = torch.distributions.kl_divergence
    expected = {"forward": kl(p, q), "reverse": kl(q, p), "js": (kl(p, middle) + kl(q, middle)) / 2}
    # One minus the overlap: what speculative sampling accepts.
    expected = (expected | {"tv": 1 - torch.minimum(p.probs, q.probs).sum(-1)})[kind] * temperature**2
    found = losses.divergence(teacher, student, kind, temperature=temperature)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if temperature == 1:
        assert torch.equal(found, losses.divergence(teacher, student, kind))
    if kind == "forward":
        logs = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
        reference = temperature**2 * F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)


def test_js_is_symmetric_bounded_and_zero_on_itself():
    teacher, student = peaked_logits()
    forth, back = losses.divergence(teacher, student, "js"), losses.divergence(student, teacher, "js")
    torch.testing.assert_close(forth, back)
    assert (forth > 0).all() and (forth < math.log(2)).all()
    for kind in losses.DIVERGENCES:
        assert losses.divergence(teacher, teacher, kind).abs().max() < 1e-5


def test_hidden_distance_is_a_share_of_the_teachers_square():
    teacher, student = torch.randn(2, N, H, generator=seeded(0))
    expected = F.mse_loss(student, teacher, reduction="none").mean(-1) / teacher.pow(2).mean(-1)
    torch.testing.assert_close(losses.hidden_distance(teacher, student), expected)
    assert losses.hidden_distance(teacher, teacher).max() == 0
    assert torch.allclose(losses.hidden_distance(teacher, 0 * student), torch.ones(N))


def test_unknown_divergence_names_the_known_ones():
    with pytest.raises(ValueError, match="'sideways'.*forward, reverse, js"):
        losses.divergence(torch.zeros(1, 2), torch.zeros(1, 2), "sideways")


@pytest.mark.parametrize("kind, temperature", KINDS)
def test_every_entry_a_candidate_is_exact(kind, temperature):
    teacher, student = peaked_logits()
    exact = losses.divergence(teacher, student, kind, temperature=temperature)
    found = on_candidates(teacher, student, V, 0, kind, temperature)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, temperature", KINDS)
def test_sampled_divergence_is_near_the_exact_one(kind, temperature):
    """32 draws of 500 of the tail's entries: a mean within 2 % of the exact loss, single draws within 8 %."""
    teacher, student = peaked_logits()
    exact = losses.divergence(teacher, student, kind, temperature=temperature).mean()
    draws = torch.stack([on_candidates(teacher, student, 500, seed, kind, temperature).mean() for seed in range(32)])
    assert abs(draws.mean() / exact - 1) < 0.02
    assert (draws / exact - 1).abs().max() < 0.08


def test_without_the_weights_the_sample_would_be_biased():
    teacher, student = peaked_logits()
    exact = losses.divergence(teacher, student).mean()
    ids, log_weight = losses.candidates(teacher.topk(1, dim=-1).indices, V, 100, seeded(0))
    weighted = losses.divergence(teacher[:, ids], student[:, ids], "forward", log_weight).mean()
    plain = losses.divergence(teacher[:, ids], student[:, ids]).mean()
    assert abs(weighted - exact) < 0.5 * abs(plain - exact)


def test_normaliser_is_unbiased():
    """The sampled softmax normaliser, averaged over draws, is the whole one: within 4 standard errors."""
    teacher, _ = peaked_logits()
    teacher = teacher[:1]
    exact, estimates = teacher.exp().sum(), []
    for seed in range(400):
        ids, log_weight = losses.candidates(teacher.topk(4, dim=-1).indices, V, 100, seeded(seed))
        estimates.append((teacher[:, ids] + log_weight).exp().sum())
    estimates = torch.stack(estimates)
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(len(estimates))


def test_sampled_gradient_points_where_the_exact_one_does():
    """Gradient on a head's parameters: cosine above 0.97 for single draws of a quarter of the vocabulary."""
    generator = seeded(0)
    head, state = torch.randn(V, H, generator=generator), torch.randn(N, H, generator=generator)
    teacher = state @ head.T
    adapter = torch.eye(H) + 0.2 * torch.randn(H, H, generator=generator)

    def gradient(negatives, seed):
        weight = adapter.clone().requires_grad_()
        on_candidates(teacher, state @ weight @ head.T, negatives, seed).mean().backward()
        return weight.grad.flatten()

    exact = gradient(None, 0)
    cosines = [F.cosine_similarity(exact, gradient(500, seed), dim=0).item() for seed in range(8)]
    assert min(cosines) > 0.97, cosines


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_gradients_in_float64(kind):
    generator = seeded(0)
    teacher = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    student = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    log_weight = torch.rand(7, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: losses.divergence(teacher, s, kind, log_weight), student)
    target = torch.tensor([0, 3, 6])
    assert torch.autograd.gradcheck(lambda s: losses.cross_entropy(s, target, log_weight), student)


def test_cross_entropy_is_the_reference_and_finds_labels_among_candidates():
    teacher, student = peaked_logits()
    labels = torch.randint(V, (N,), generator=seeded(1))
    expected = F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(losses.cross_entropy(student, labels), expected)
    ids, log_weight = losses.candidates(teacher.topk(K, dim=-1).indices, V, V - 1, seeded(0), labels)
    target = torch.searchsorted(ids, labels)
    torch.testing.assert_close(losses.cross_entropy(student[:, ids], target, log_weight), expected)
    ids, log_weight = losses.candidates(teacher.topk(K, dim=-1).indices, V, 500, seeded(0), labels)
    target = torch.searchsorted(ids, labels)
    assert torch.equal(ids[target], labels)
    sampled = losses.cross_entropy(student[:, ids], target, log_weight)
    assert abs(sampled.mean() / expected.mean() - 1) < 0.02


@pytest.mark.parametrize("chunk", [1, 7, 48, 500])
def test_chunks_change_nothing(chunk):
    generator = seeded(0)
    head, state = torch.randn(V, H, generator=generator), torch.randn(N, H, generator=generator)
    weight = torch.randn(H, H, generator=generator)

    def loss(teacher_state, student_state):
        values = losses.divergence(teacher_state @ head.T, student_state @ head.T)
        return torch.stack([values, 2 * values])

    outcomes = []
    for how in (lambda *states: losses.in_chunks(loss, *states, chunk=chunk), loss):
        moved = weight.clone().requires_grad_()
        values = how(state, state @ moved)
        values.sum().backward()
        outcomes.append((values, moved.grad))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-4)


def test_chunks_keep_no_logits_for_backward():
    """What autograd holds on to after the chunked forward is the size of the states, not of the logits."""
    head, state = torch.randn(V, H, generator=seeded(0)), torch.randn(512, H, generator=seeded(1))
    student = state.clone().requires_grad_()

    def saved_elements(how) -> int:
        largest = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.numel()) or t, lambda t: t)
        with keep:
            how(lambda t, s: losses.divergence(t @ head.T, s @ head.T), state, student)
        return max(largest)

    assert saved_elements(lambda function, *states: function(*states)) >= 512 * V
    assert saved_elements(lambda function, *states: losses.in_chunks(function, *states, chunk=32)) < 512 * V // 16


def test_regret_and_harm():
    logits = torch.tensor([[1.0, 3.0, 2.9], [0.0, 0.0, 5.0]])
    cost = losses.regret(logits, torch.tensor([2, 0]))
    torch.testing.assert_close(cost, torch.tensor([0.1, 5.0]))
    torch.testing.assert_close(losses.regret(logits.log_softmax(-1), torch.tensor([2, 0])), cost)
    assert losses.regret(logits, logits.argmax(-1)).tolist() == [0, 0]
    assert losses.harm(cost, 0.25).tolist() == [False, True]


def test_gate_loss_balances_the_classes():
    """9 in 10 harmless: both classes weigh the same in all, and a gate that knows nothing settles at one half."""
    no_harm = torch.arange(100) % 10 != 0
    prior = no_harm.float().mean()
    logit = torch.zeros(100, requires_grad=True)
    loss = losses.gate_loss(logit, no_harm, prior)
    torch.testing.assert_close(loss[no_harm].sum(), loss[~no_harm].sum())
    torch.testing.assert_close(loss.mean(), torch.tensor(math.log(2)))
    loss.sum().backward()
    assert abs(logit.grad.sum()) < 1e-4


@pytest.mark.parametrize("frequency", [0.0, 1.0])
def test_gate_loss_survives_a_class_that_never_came(frequency):
    prior = torch.tensor(frequency)
    no_harm = torch.full((8,), bool(frequency))
    assert losses.gate_loss(torch.zeros(8), no_harm, prior).isfinite().all()
    surprise = losses.gate_loss(torch.zeros(8), ~no_harm, prior)
    torch.testing.assert_close(surprise, torch.full((8,), losses.MAX_CLASS_WEIGHT * math.log(2)))
    assert losses.prior_shift(prior).isfinite()


@pytest.mark.parametrize("bias", [-4.0, -1.0, 0.0, 2.0])
def test_prior_shift_makes_a_balanced_gate_a_probability_again(bias):
    """P(no harm | x) = sigmoid(2 x + bias): a balanced gate is off; shifted it is right, rare classes too."""
    generator = seeded(0)
    x = torch.randn(20000, generator=generator)
    no_harm = torch.rand(20000, generator=generator) < torch.sigmoid(2 * x + bias)
    prior = no_harm.float().mean()
    gate = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([gate], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = losses.gate_loss(gate[0] * x + gate[1], no_harm, prior).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    logit = (gate[0] * x + gate[1]).detach()
    balanced = losses.calibration_error(torch.sigmoid(logit), no_harm)
    shifted = losses.calibration_error(torch.sigmoid(logit + losses.prior_shift(prior)), no_harm)
    assert shifted < 0.012
    assert abs(prior - 0.5) < 0.1 or balanced > 4 * shifted


def test_calibration_error_by_hand():
    """Bins of ten: 0.12 and 0.18 with one hit of two, 0.95 hit, 1.0 missed (it belongs to the last bin)."""
    scores, targets = torch.tensor([0.12, 0.18, 0.95, 1.0]), torch.tensor([True, False, True, False])
    first, last = abs(0.5 - 0.15), abs(0.5 - 0.975)
    torch.testing.assert_close(losses.calibration_error(scores, targets), torch.tensor(0.5 * first + 0.5 * last))
    torch.testing.assert_close(
        losses.calibration_error(scores, targets, bins=1), torch.tensor(abs(0.5 - scores.mean().item()))
    )
    assert losses.calibration_error(scores[:0], targets[:0]) == 0


def test_layer_dropout_rates_grow_from_nothing_to_p_max():
    rates = losses.layer_dropout_rates(5, 0.2)
    expected = [0.2 * (math.exp(layer * math.log(2) / 4) - 1) for layer in range(5)]
    assert rates == pytest.approx(expected) and rates[0] == 0 and rates[-1] == pytest.approx(0.2)
    assert losses.layer_dropout_rates(1, 0.2) == [0.0]


def test_rotational_visits_every_exit_in_turn():
    assert [losses.rotational(step, 3) for step in (0, 1, 2, 3)] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [True, False, False],
    ]


def test_gradual_starts_at_the_deepest_and_has_all_after_half_of_the_steps():
    taking_part = [losses.gradual(step, 12, 3) for step in range(12)]
    assert taking_part[:2] == [[False, False, True]] * 2 and taking_part[2:4] == [[False, True, True]] * 2
    assert taking_part[4:] == [[True, True, True]] * 8


@pytest.mark.parametrize("curriculum, expected", [("rotational", [{1}, {4}, {1}]), ("gradual", [{4}, {1, 4}, {1, 4}])])
def test_an_exit_without_weight_takes_no_turn(llama, curriculum, expected):
    asked = ExitConfig([1, 2, 4], head="norm", shortlist=[None, None, 24])
    model = EarlyExitModel(llama, asked, LossConfig(weights=[1, 0, 1], curriculum=curriculum)).train()
    model.own_clock, model.steps = False, 4
    ids = torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
    for model.step, depths in enumerate(expected):
        found = {name for name in model(input_ids=ids, labels=ids.clone()).metrics if name.endswith("/loss")}
        assert found == {f"exit_{depth}/loss" for depth in depths}


def test_hidden_distance_is_added_at_its_weight(llama):
    ids = torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    losses_at = [
        EarlyExitModel(llama, ExitConfig(depths=[2], head="norm"), LossConfig(negatives=negatives, hidden=weight))(
            **inputs
        ).metrics["exit_2/loss"]
        for negatives, weight in ((None, 0.0), (None, 2.0), (VOCAB, 2.0))
    ]
    with torch.no_grad():
        states = llama(inputs["input_ids"], output_hidden_states=True).hidden_states
        student, teacher = llama.model.norm(states[2])[:, :-1], states[-1][:, :-1]
        distance = ((student - teacher).pow(2).sum(-1) / teacher.pow(2).sum(-1)).mean()
    for loss in losses_at[1:]:
        assert torch.allclose(loss - losses_at[0], 2 * distance, rtol=1e-4)
