"""Exits: a head that turns the state at some depth into logits, and a gate that says whether to trust it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from adaptive.anatomy import linear_weights, plain_copy
from adaptive.backbone import Backbone
from adaptive.config import COMPARING, ExitConfig
from adaptive.fills import Fill
from adaptive.losses import prior_shift
from adaptive.screen import Screen, exact_logits
from adaptive.turned import turned

ADAPTED = ("linear", "linear_mlp")  # heads with a low-rank residual adapter
BASELINES = (*COMPARING, "similarity")


class GatedMLP(nn.Module):
    """Residual gated MLP: x + down(act(gate(norm(x))) * up(norm(x))) (Shazeer 2020, "GLU variants", eq. 6).

    Takes the MLP of `source`, a copy of a backbone block, where that has the same form; starts as the identity where
    it has not.
    """

    def __init__(self, backbone: Backbone, source: nn.Module):
        super().__init__()
        hidden = backbone.hidden_size
        mlp, norm = getattr(source, "mlp", None), getattr(source, "post_attention_layernorm", None)
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        activation = getattr(backbone.config, "hidden_act", None) or getattr(
            backbone.config, "hidden_activation", "silu"
        )
        self.act = ACT2FN[activation if isinstance(activation, str) else "silu"]
        if (
            norm is not None
            and not hasattr(source, "pre_feedforward_layernorm")
            and not hasattr(source, "post_feedforward_layernorm")  # OLMo 2 and others norm what comes out instead
            and all(type(p) is nn.Linear for p in parts)
        ):
            self.norm, (self.gate, self.up, self.down) = norm, parts
        else:
            self.norm = copy.deepcopy(backbone.norm)
            self.gate, self.up = nn.Linear(hidden, 2 * hidden, bias=False), nn.Linear(hidden, 2 * hidden, bias=False)
            self.down = nn.Linear(2 * hidden, hidden, bias=False)
            nn.init.zeros_(self.down.weight)

    def forward(self, state: Tensor) -> Tensor:
        """Returns the state [..., hidden] after the residual MLP."""
        normed = self.norm(state)
        return state + self.down(self.act(self.gate(normed)) * self.up(normed))


class Head(nn.Module):
    """State at some depth -> normed state that the LM head (or a shortlist of its rows) can read.

    Args:
        backbone: source of the norm, of copied MLPs and of copied blocks.
        kind: "norm", "linear" (low-rank residual adapter), "mlp" (residual gated MLPs), "linear_mlp" (an adapter, and
            then MLPs that add nothing at first) or "block" (decoder blocks).
        rank: of the adapter.
        layers: number of MLPs or blocks, copied from the backbone's last ones.
    """

    def __init__(self, backbone: Backbone, kind: str, rank: int, layers: int):
        super().__init__()
        self.kind = kind
        self.sources = range(backbone.num_layers - layers, backbone.num_layers)
        if kind in ADAPTED:
            self.down = nn.Linear(backbone.hidden_size, rank, bias=False)
            self.up = nn.Linear(rank, backbone.hidden_size, bias=False)
            nn.init.zeros_(self.up.weight)
        if kind in ("mlp", "linear_mlp"):
            self.mlps = nn.ModuleList(GatedMLP(backbone, plain_copy(backbone.blocks[i])) for i in self.sources)
            if kind == "linear_mlp":  # the adapter has made the last state already, which the copies do not expect
                for mlp in self.mlps:
                    nn.init.zeros_(mlp.down.weight)
        elif kind == "block":
            self.blocks = nn.ModuleList(plain_copy(backbone.blocks[i]) for i in self.sources)
        self.norm = copy.deepcopy(backbone.norm)

    @turned
    def forward(self, state: Tensor, calls: list | None = None) -> Tensor:
        """Returns the normed state [batch, tokens, hidden].

        Args:
            state: [batch, tokens, hidden] at the exit's depth.
            calls: arguments of the copied blocks (kind "block" only), from `Backbone.start`.
        """
        if self.kind in ADAPTED:
            state = state + self.up(self.down(state))
        if self.kind in ("mlp", "linear_mlp"):
            for mlp in self.mlps:
                state = mlp(state)
        elif self.kind == "block":
            for block, source in zip(self.blocks, self.sources, strict=True):
                args, kwargs = calls[source]
                out = block(state, *args, **kwargs)
                state = out[0] if isinstance(out, tuple) else out
        return self.norm(state)


class Gate(nn.Module):
    """State -> estimated probability that leaving here does no harm.

    The logit is trained with classes balanced; `prior`, the running frequency of "no harm", makes the score a
    probability again (`losses.prior_shift`).

    Args:
        kind: "linear" or "mlp" on the normed state, or a training-free baseline: "max_prob", "margin", "entropy" of the
            head's distribution, "similarity" of the state to the one at the exit before.
    """

    def __init__(self, backbone: Backbone, kind: str):
        super().__init__()
        self.kind = kind
        if kind in BASELINES:
            return
        self.norm = copy.deepcopy(backbone.norm).float().requires_grad_(True)  # of a backbone that may be frozen
        hidden = backbone.hidden_size
        self.read = (
            nn.Linear(hidden, 1)
            if kind == "linear"
            else nn.Sequential(nn.Linear(hidden, 64), nn.GELU(), nn.Linear(64, 1))
        )
        self.register_buffer("prior", torch.tensor(0.5))

    @property
    def learned(self) -> bool:
        """Whether the gate has parameters."""
        return self.kind not in BASELINES

    @property
    def reads_logits(self) -> bool:
        """Whether the head must be evaluated before the gate can be asked."""
        return self.kind in COMPARING

    def forward(self, state: Tensor) -> Tensor:
        """Returns the class-balanced logit [...] of a learned gate for states [..., hidden]."""
        # In 32 bits, unless the whole model was put into another type: a layer norm takes none but its own.
        normed = self.norm(state.to(next(self.norm.parameters()).dtype))
        return self.read(normed.to(next(self.read.parameters()).dtype)).squeeze(-1)

    def score(self, state: Tensor, logits: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """Returns scores [...] in [0, 1].

        Args:
            state: [..., hidden] at the exit's depth.
            logits: [..., entries] of the exit's head, for baselines that read them.
            before: [..., hidden] at the exit before (the embedding for the first), for "similarity".
        """
        if self.learned:
            return torch.sigmoid(self(state) + prior_shift(self.prior))
        if self.kind == "similarity":
            return ((1 + nn.functional.cosine_similarity(state.float(), before.float(), dim=-1)) / 2).clamp(0, 1)
        probs = logits.float().softmax(-1)
        if self.kind == "entropy":
            return (1 + (probs * probs.clamp_min(1e-30).log()).sum(-1) / math.log(probs.shape[-1])).clamp(0, 1)
        best = probs.topk(2).values
        return best[..., 0] if self.kind == "max_prob" else best[..., 0] - best[..., 1]


class Exits(nn.Module):
    """All exits of a model: heads, gates and shortlists. One module, so that PEFT, FSDP and checkpoints see one.

    Args:
        backbone: the model they sit in.
        config: depths, head kinds, gate kind, shortlists.
    """

    def __init__(self, backbone: Backbone, config: ExitConfig):
        super().__init__()
        kinds = config.per_exit("head")
        self.config, self.kinds = config, kinds
        self.heads = nn.ModuleList(Head(backbone, kind, config.rank, config.layers) for kind in kinds)
        dtype = backbone.norm_dtype
        self.heads.to(dtype)
        self.gates = nn.ModuleList(Gate(backbone, config.gate) for _ in kinds)
        fitted = config.fill == "fitted" and backbone.packs
        self.fills = nn.ModuleList(
            Fill(backbone.projections, depth) if fitted and depth < backbone.num_layers else None
            for depth in config.depths
        )
        self.sizes = config.per_exit("shortlist")
        self.screen = Screen(backbone, config.screen) if config.screen is not None else None
        for index, size in enumerate(self.sizes):
            fixed = size is not None and self.screen is None
            self.register_buffer(f"shortlist_{index}", torch.arange(size) if fixed else None)
        self.to(backbone.device)
        for head in self.heads:
            head.requires_grad_(True)
            if head.kind == "block" and config.head_kv == "shared":
                for name, parameter in head.blocks.named_parameters():
                    if "k_proj" in name or "v_proj" in name or "k_norm" in name:
                        parameter.requires_grad_(False)
        self._rows: dict = {}

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def shares_kv(self) -> bool:
        """Whether any block head reads the backbone's K/V."""
        return "block" in self.kinds and self.config.head_kv == "shared"

    def shortlist(self, exit: int) -> Tensor | None:
        """Vocabulary ids [entries] that an exit can say, ascending; None for all of them, or where a screen picks."""
        return getattr(self, f"shortlist_{exit}")

    def screened(self, exit: int) -> bool:
        """Whether the exit's shortlist is picked anew for every token."""
        return self.screen is not None and self.sizes[exit] is not None

    def choose_shortlists(self, counts: Tensor) -> None:
        """Sets every fixed shortlist to the most frequent entries of `counts` [vocabulary]; ties go to the lower id."""
        order = torch.argsort(counts, descending=True, stable=True)
        for index in range(len(self)):
            ids = self.shortlist(index)
            if ids is not None:
                setattr(self, f"shortlist_{index}", order[: len(ids)].sort().values.to(ids.device))

    def logits(self, backbone: Backbone, exit: int, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns an exit's logits [N, entries] for normed states [N, hidden] of its head, and the vocabulary ids that
        they belong to: [entries], [N, entries] where a screen picks, or None for the whole vocabulary in order."""
        if self.screened(exit):
            ids = self.screen(normed, self.sizes[exit])
            return exact_logits(backbone, normed, ids), ids
        ids = self.shortlist(exit)
        if ids is None:
            return backbone.logits(normed), None
        weight, bias = self._shortlist_rows(backbone, exit, ids)
        return backbone.cap(nn.functional.linear(normed, weight, bias)), ids

    def said(self, backbone: Backbone, exit: int, normed: Tensor, chunk: int, among: Tensor | None = None) -> Tensor:
        """Returns the vocabulary entry [N] that an exit would say.

        Args:
            backbone: has the LM head.
            exit: index of the exit.
            normed: normed states [N, hidden] of its head.
            chunk: positions whose logits are held at once.
            among: the best entry is looked for among these; None for the whole vocabulary.
        """
        if self.sizes[exit] is None and among is not None:
            return among[torch.cat([backbone.logits(piece, among).argmax(-1) for piece in normed.split(chunk)])]
        said = partial(self._screened_word, among) if self.screened(exit) else lambda *args: best(*self.logits(*args))
        return torch.cat([said(backbone, exit, piece) for piece in normed.split(chunk)])

    def _screened_word(self, among: Tensor | None, backbone: Backbone, exit: int, normed: Tensor) -> Tensor:
        # For many states one product with the LM head is faster than every state's own picks; they are needed only
        # where the head's best entry is not among them.
        word = backbone.logits(normed, among).argmax(-1)
        word = word if among is None else among[word]
        lost = ~self.screen.holds(normed, word, self.sizes[exit])
        if lost.any():
            word[lost] = best(*self.logits(backbone, exit, normed[lost]))
        return word

    def _shortlist_rows(self, backbone: Backbone, exit: int, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        # Gathering thousands of rows per token would cost more than the shortlist saves.
        source = backbone.head.weight
        key = (source.data_ptr(), source._version, ids.data_ptr(), ids._version)
        if self._rows.get(exit, (None,))[0] != key:
            weight, bias = backbone.vocabulary(ids)
            self._rows[exit] = (key, weight.detach(), None if bias is None else bias.detach())
        return self._rows[exit][1:]

    def shapes(self, backbone: Backbone, depths: Sequence[int]) -> list[dict]:
        """Returns what each exit costs, as plain numbers for `costs.py`: `depth`, `head` weights multiplied before the
        vocabulary, `vocab` weights of its vocabulary rows (and of the screen that picks them), `gate` weights, `blocks`
        of a block head, `own_kv`, `reads_logits`."""
        out = []
        for index, (head, gate) in enumerate(zip(self.heads, self.gates, strict=True)):
            size = self.sizes[index]
            entries = backbone.vocab_size if size is None else size
            preview = self.screen.weights if self.screened(index) else 0
            blocks = [backbone.block_shape(source) for source in head.sources] if head.kind == "block" else []
            out.append(
                {
                    "depth": depths[index],
                    "head": 0 if blocks else linear_weights(head),
                    "vocab": entries * backbone.hidden_size + preview,
                    "gate": linear_weights(gate),
                    "blocks": blocks,
                    "own_kv": bool(blocks) and self.config.head_kv == "own",
                    "reads_logits": gate.reads_logits,
                }
            )
        return out


def best(logits: Tensor, ids: Tensor | None) -> Tensor:
    """Returns the vocabulary entry [N] with the highest of the logits [N, entries] that `Exits.logits` gave."""
    # The lowest id wins a tie, in whatever order a screen has picked.
    top = logits.argmax(-1)
    if ids is None or ids.dim() == 1:
        return top if ids is None else ids[top]
    return ids.masked_fill(logits < logits.amax(-1, keepdim=True), torch.iinfo(ids.dtype).max).amin(-1)


def spread(logits: Tensor, ids: Tensor | None, vocab: int) -> Tensor:
    """Returns logits [N, vocab] from what `Exits.logits` gave; what is not on a shortlist cannot be said."""
    if ids is None:
        return logits
    full = logits.new_full((len(logits), vocab), -torch.inf)
    return full.scatter_(1, ids.expand_as(logits), logits)


def widened(logits: Tensor, listed: Sequence[tuple], rows: np.ndarray, backbone: Backbone) -> Tensor:
    """Returns logits [batch, vocabulary] in which some rows that a shortlist spoke for have the whole vocabulary's.

    Args:
        logits: [batch, vocabulary]; not changed.
        listed: rows of the batch [N], and their normed states [N, hidden], of every exit with a shortlist.
        rows: of the batch, to widen.
        backbone: has the LM head.
    """
    logits = logits.clone()
    for who, normed in listed:
        some = np.flatnonzero(np.isin(who, rows))
        if len(some):
            logits[torch.as_tensor(who[some])] = backbone.logits(normed[torch.as_tensor(some)]).float()
    return logits
