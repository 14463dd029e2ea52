"""Drawing tokens: every row from a generator of its own, so that what it says does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor


def generators(seed: int | Sequence[int] | None, input_ids: Tensor) -> list[torch.Generator]:
    """Returns one generator per row of input_ids [batch, tokens]; row r's is seeded with seed + r, or with seed[r]."""
    seed = plain_seed(seed)
    if not isinstance(seed, Sequence):
        base = int(torch.randint(2**62, ())) if seed is None else seed
        seed = range(base, base + len(input_ids))
    # On the CPU for every device: equal seeds draw the same everywhere, and a large batch launches nothing per row.
    return [torch.Generator().manual_seed(each) for each in seed]


def plain_seed(seed) -> int | Sequence[int] | None:
    """Returns a seed, or the seeds of all rows, as plain numbers; arrays and tensors will do."""
    seed = seed.tolist() if hasattr(seed, "tolist") else seed
    return [int(each) if isinstance(each, Integral) else each for each in seed] if isinstance(seed, Sequence) else seed


def pick(scores: Tensor, sources: list | None, live: Sequence[int]) -> Tensor:
    """Returns the next ids [rows] for scores [rows, vocabulary]: the best, or one sampled per live row."""
    if sources is None:
        return scores.argmax(-1)
    return draw(scores.float().softmax(-1), sources, live)


def draw(probabilities: Tensor, sources: list[torch.Generator], live: Sequence[int]) -> Tensor:
    """Returns ids [rows] drawn from probabilities [rows, vocabulary], which need not add up to 1."""
    # One draw per row from its own generator, turned into an id by the inverse of the cumulated probabilities: the
    # work over the vocabulary is done for all rows at once.
    cumulated = probabilities.cumsum(-1)
    draws = torch.zeros(len(probabilities), 1)
    for row in live:
        draws[row] = torch.rand((), generator=sources[row])
    draws = draws.to(cumulated)
    total = cumulated[:, -1:]
    # Strictly below the total: an entry of probability 0 behind the last possible one must not be hit by rounding.
    draws = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, draws, right=True)[:, 0]


def lost(logits: Tensor, scores: Tensor) -> Tensor:
    """Returns which rows [rows] have no allowed entry on their shortlist, beyond which logits [rows, vocabulary] are
    -inf, by the scores [rows, vocabulary] that processors made of them."""
    # -inf may have become NaN or the least number, everywhere, or a forced token may lie beyond the shortlist. In all
    # these cases, and in no other, nothing on the list is better than everything beyond it.
    beyond = logits == -torch.inf
    inside = scores.masked_fill(beyond, -torch.inf).amax(-1)
    return ~(inside > scores.masked_fill(~beyond, -torch.inf).amax(-1))


def judge(
    scores: Tensor, drafts: Sequence[int], proposed: Sequence[Tensor], source: torch.Generator
) -> tuple[int, int]:
    """Returns how many drafts are kept, and the token behind them: all of them together follow the distribution of
    `scores` (Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", section 2.3).

    Args:
        scores: [drafts + 1, vocabulary] of the full model, at every draft's place and behind the last.
        drafts: ids that were drafted.
        proposed: probabilities [vocabulary] that each was drawn from.
        source: of the row.
    """
    wanted = scores.float().softmax(-1)
    for place, (draft, q) in enumerate(zip(drafts, proposed, strict=True)):
        p = wanted[place]
        if torch.rand((), generator=source) * q[draft] < p[draft]:
            continue
        rest = (p - q).clamp_min(0)
        # Rounding may leave nothing where both distributions are the same.
        rest = rest if rest.sum() > 0 else p
        return place, int(draw(rest[None], [source], [0]))
    return len(drafts), int(draw(wanted[-1:], [source], [0]))
