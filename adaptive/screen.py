"""A low-rank preview of the LM head that picks, per token, the few vocabulary entries worth an exact logit."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from adaptive.backbone import Backbone
from adaptive.turned import PARTS, turned

SHRINKAGE = 0.05  # of the states' covariance towards a multiple of the identity: a few thousand states decide it


class Screen(nn.Module):
    """Normed state -> the `entries` vocabulary entries whose previewed logits are highest.

    The preview is `up(down(state)) + bias`, the best rank-r approximation of the LM head on states like those that it
    was fitted to. Only the entries picked get exact logits, so that what is said differs from the full head's word only
    where that is not among them. Preview and full logits on the survivors: Shim et al. 2017, "SVD-Softmax", section 3;
    here the decomposition is weighted by the states' covariance.

    Args:
        backbone: has the LM head.
        rank: of the preview.

    Raises:
        ValueError: a rank above the backbone's hidden size, or an LM head that is not a plain linear layer.

    Attributes:
        down: [rank, hidden].
        up: [vocabulary, rank].
        bias: [vocabulary].
    """

    def __init__(self, backbone: Backbone, rank: int):
        super().__init__()
        hidden, vocab = backbone.hidden_size, backbone.vocab_size
        if rank > hidden:
            raise ValueError(f"`screen` is {rank}; this backbone's states have {hidden} numbers: choose a lower rank")
        # Until it is fitted, the preview knows the first `rank` of the state's numbers: cheap, valid and poor.
        self.register_buffer("down", torch.eye(rank, hidden))
        every = torch.arange(vocab, device=backbone.head.weight.device)
        self.register_buffer("up", backbone.vocabulary(every)[0].detach()[:, :rank].float().clone())
        self.register_buffer("bias", torch.zeros(vocab))

    @torch.no_grad()
    def fit(self, backbone: Backbone, states: Tensor) -> None:
        """Sets the preview to the rank-r matrix M that minimises the mean of |W x - M x - c|^2 over the states.

        `low_rank` in the metric of the states' covariance; c moves the states' mean to where W has it.

        Args:
            backbone: has the LM head W.
            states: [N, hidden] that the LM head reads: after the final norm.
        """
        states = states.double()
        weight, bias = backbone.vocabulary(torch.arange(backbone.vocab_size, device=self.up.device))
        mean = states.mean(0)
        centered = states - mean
        cov = centered.T @ centered / len(states)
        cov = (1 - SHRINKAGE) * cov + SHRINKAGE * cov.diagonal().mean().clamp_min(1e-12) * torch.eye(
            len(cov), device=cov.device, dtype=cov.dtype
        )
        out, down = low_rank((weight.float().T @ weight.float()).double(), cov, len(self.down))
        self.up.copy_(weight.float() @ out.float())
        self.down.copy_(down.float())
        self.bias.copy_(weight.float() @ mean.float() - self.up.float() @ (down @ mean).float())
        if bias is not None:
            self.bias.add_(bias.float())

    def forward(self, normed: Tensor, entries: int) -> Tensor:
        """Returns vocabulary ids [N, entries], unordered, for normed states [N, hidden]."""
        preview = self._preview(normed)
        if preview.device.type != "cpu":
            return preview.topk(entries, sorted=False).indices
        # A third of the time that torch's topk takes.
        order = np.argpartition(preview.detach().numpy(), preview.shape[1] - entries, axis=1)
        return torch.from_numpy(order[:, -entries:].copy())

    def holds(self, normed: Tensor, words: Tensor, entries: int) -> Tensor:
        """Returns whether `forward` picks the entry `words` [N] for normed states [N, hidden]; bool [N]."""
        preview = self._preview(normed)
        limit = preview.gather(1, words[:, None])
        # On a CPU a few rows at a time, and in 32 bits: that fits a cache, and takes half the time.
        pieces = [part.split(16 if part.device.type == "cpu" else max(len(part), 1)) for part in (preview, limit)]
        above = [(some > least).sum(1, dtype=torch.int32) for some, least in zip(*pieces)]
        return torch.cat(above) < entries

    @turned
    def _preview(self, normed: Tensor) -> Tensor:
        # In 32 bits, whatever type the model was put into, under autocast too: in half of them many entries would tie.
        with torch.autocast(normed.device.type, enabled=False):
            low = nn.functional.linear(normed.float(), self.down.float())
            return nn.functional.linear(low, self.up.float(), self.bias.float())

    @property
    def weights(self) -> int:
        """Weights multiplied per token."""
        return self.down.numel() + self.up.numel()


def low_rank(gram: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A [hidden, rank] and B [rank, hidden] such that W A B is the best rank-r stand-in for W on states x: it
    minimises the mean of |W x - W A B x|^2.

    With second moment C of the states, A = C^1/2 V and B = V' C^-1/2, V the leading eigenvectors of C^1/2 W'W C^1/2
    (Eckart and Young 1936, in the metric of C).

    Args:
        gram: W'W [hidden, hidden].
        moment: C [hidden, hidden], without a zero eigenvalue.
        rank: at most hidden.
    """
    values, vectors = torch.linalg.eigh(moment)
    root, inverse = (vectors * power @ vectors.T for power in (values.sqrt(), values.rsqrt()))
    leading = torch.linalg.eigh(root @ gram @ root).eigenvectors[:, -rank:]
    return root @ leading, leading.T @ inverse


def exact_logits(backbone: Backbone, normed: Tensor, ids: Tensor) -> Tensor:
    """Returns the LM head's logits [N, entries] of entries `ids` [N, entries] for normed states [N, hidden]."""
    head = backbone.head
    if normed.device.type != "cpu":
        return _exact(backbone, normed, ids)
    if torch.is_grad_enabled() or type(head) is not nn.Linear or {head.weight.dtype, normed.dtype} != {torch.float32}:
        # Row by row: a row's entries fit a CPU's cache, those of a batch do not.
        return torch.stack([_exact(backbone, state, chosen) for state, chosen in zip(normed, ids, strict=True)])
    logits = _sampled(normed, head.weight, ids)
    return backbone.cap(logits if head.bias is None else logits + head.bias[ids])


def _exact(backbone: Backbone, normed: Tensor, ids: Tensor) -> Tensor:
    weight, bias = backbone.vocabulary(ids)
    logits = (weight.to(normed.dtype) @ normed[..., None])[..., 0]
    return backbone.cap(logits if bias is None else logits + bias.to(logits.dtype))


def _sampled(normed: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Returns the products [N, entries] of states [N, hidden] with their `ids` [N, entries] of the weight's rows.

    The rows are read where they lie; gathering them first takes twice as long for eight states, and more for one.
    Threads share what are rows of the sparse result, so each state's are cut into pieces."""
    count, entries = ids.shape
    pieces = math.gcd(entries, PARTS)
    ends = torch.arange(0, ids.numel() + 1, entries // pieces)
    size = count * pieces, len(weight)
    wanted = torch.sparse_csr_tensor(ends, ids.flatten(), normed.new_zeros(ids.numel()), size, check_invariants=False)
    states = normed.repeat_interleave(pieces, 0)
    return torch.sparse.sampled_addmm(wanted, states, weight.t(), beta=0.0).values().view(count, entries)


# torch says once that its sparse tensors are young; nobody here has asked for one.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
