"""A distillation temperature: what it does to gradients, and that the model's loss is compared at it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB
from test_losses import peaked_logits

from adaptive import EarlyExitModel, ExitConfig, losses
from adaptive.config import LossConfig

torch.set_num_threads(1)


@pytest.mark.parametrize("kind, share", [("forward", 1), ("reverse", 1), ("js", 0.25)])
def test_a_high_temperature_matches_logits(kind, share):
    """Gradients do not fade: they come to the difference of centred logits over V (Hinton et al. 2015, equation 4)."""
    teacher, student = (logits[:, :50].double() for logits in peaked_logits())
    student.requires_grad_()
    losses.divergence(teacher, student, kind, temperature=1e4).sum().backward()
    difference = student.detach() - teacher
    expected = share * (difference - difference.mean(-1, keepdim=True)) / 50
    torch.testing.assert_close(student.grad, expected, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_models_loss_is_the_plain_formula(llama, temperature):
    """On the whole vocabulary in chunks (`negatives` none), and with every entry a candidate."""
    ids = torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = llama(ids, output_hidden_states=True).hidden_states
        normed = (llama.model.norm(states[2])[:, :-1], states[-1][:, :-1])
        student, teacher = (F.log_softmax(llama.lm_head(state) / temperature, -1) for state in normed)
        expected = temperature**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    for negatives in (None, VOCAB):
        config = LossConfig(negatives=negatives, temperature=temperature)
        model = EarlyExitModel(llama, ExitConfig(depths=[2], head="norm"), config)
        found = model(input_ids=ids, labels=ids.clone()).metrics["exit_2/loss"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
