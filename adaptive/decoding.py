"""The decoding loop that `generate` of transformers is handed: one strategy for K/V or another, and the trace of it.

`decode` is given to `generate(custom_generate=...)`, which prepares logits processors, stopping criteria and masks. The
prompt is prefilled at full depth; the policy applies to every generated token, the first included (where drafts are
verified, the first is the full model's). What a step does is in `walk.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaptive.backbone import Backbone
from adaptive.drafting import SEVERAL, SHARED, Drafting
from adaptive.exits import widened
from adaptive.lanes import Tokens
from adaptive.policy import ExitPolicy
from adaptive.replay import Replay, steps
from adaptive.sampling import generators, lost, pick, plain_seed
from adaptive.turned import pays
from adaptive.verify import Speculation
from adaptive.walk import Walk

STRATEGIES = ("propagate", "recompute", "verify")
OTHER = ("prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha", "dola_layers")  # ways of transformers
STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
HANDLED = ("attention_mask", "past_key_values", "position_ids")  # of what `generate` prepares
NEEDLESS = ("cache_position", "logits_to_keep", "labels")  # change nothing about the tokens


@torch.no_grad()
def decode(
    inner,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    *,
    model,
    policy: ExitPolicy | Sequence[ExitPolicy],
    kv: str = "propagate",
    probe: bool = False,
    seed: int | Sequence[int] | None = None,
    streamer=None,
    **model_kwargs,
):
    """Returns generated ids [batch, prompt + new], or transformers' output object with `.trace` added.

    Args:
        inner: the backbone that `generate` was called on.
        input_ids: [batch, prompt], left-padded.
        logits_processor, stopping_criteria, generation_config: as `generate` prepared them. The caller's own ones must
            keep no state: shortlists ask processors twice for a token, "verify" asks for drafts, too, and shows one row
            at a time, in as many copies as the batch has rows.
        model: the `EarlyExitModel`.
        policy: who leaves where; one for all rows, or one for each.
        kv: one of STRATEGIES, see `Walk`.
        probe: see `Walk`.
        seed: row r samples from its own generator, seeded with seed + r, or with seed[r]: a row alone gives what it
            gives in a batch.
        streamer: gets every column of new ids.
        **model_kwargs: what `generate` prepared for the model's forward; the mask is used, the cache must be empty.
    """
    seed, mask = plain_seed(seed), model_kwargs.get("attention_mask")
    problems = _unsupported(inner, logits_processor, input_ids, model_kwargs, kv)
    if problems := problems + _misfits(generation_config, input_ids, mask, model.view, kv, policy, seed):
        raise ValueError("generate: " + "; ".join(problems))
    tokens = Tokens(input_ids, mask)
    walk = Walk(model.view, model.exits, model.depths, policy, tokens, kv, probe)
    sources = generators(seed, input_ids) if generation_config.do_sample else None
    loop = None
    if kv == "verify" and any(walk.asked) and not probe:
        units = model.costs.units()
        several = SHARED if pays(input_ids.device) and model.dtype == torch.float32 else SEVERAL
        plans = [Drafting(*units, walk.asked, several) for _ in input_ids]
        loop = Speculation(walk, logits_processor, stopping_criteria, generation_config, sources, plans, streamer)
        ids, scores, logits = loop.run()
    else:
        short = any(asked and size for asked, size in zip(walk.asked, model.exits.sizes, strict=True))
        prepared = logits_processor, stopping_criteria, generation_config
        with steps(walk, generation_config.cache_implementation == "static") as taker:
            scores, logits = _loop(taker, tokens, *prepared, sources, streamer, model.view if short else None)
        ids = tokens.ids
    if not generation_config.return_dict_in_generate:
        return ids
    out = GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=logits, past_key_values=None)
    out.trace = walk.record.trace(kv) if loop is None else loop.trace()
    return out


def with_stop_strings(kwargs: dict, default: GenerationConfig) -> dict:
    """Returns keyword arguments of `generate` in which `stop_strings`, theirs or those of the generation config (the
    model's is the `default`), and the `tokenizer` that they need are a stopping criterion: transformers loses the
    tokenizer on its way to a loop that is not its own."""
    tokenizer = kwargs.get("tokenizer")
    configs = [config for config in (kwargs.get("generation_config"), default) if config is not None]
    stops = kwargs.get("stop_strings") or next((found for config in configs if (found := config.stop_strings)), None)
    if not stops or tokenizer is None:  # transformers says what is missing
        return kwargs
    criteria = [*(kwargs.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, stops)]
    rest = {name: value for name, value in kwargs.items() if name != "tokenizer"}
    return rest | {"stopping_criteria": StoppingCriteriaList(criteria), "stop_strings": None}  # stronger than configs'


def _loop(
    walk: Walk | Replay,
    tokens: Tokens,
    processors,
    criteria,
    config,
    sources: list | None,
    streamer,
    backbone: Backbone | None,
) -> tuple:
    """Generates into `tokens` until every row has stopped; returns scores and logits per step, if asked for.

    Given a `backbone`, a row that left with a shortlist of which processors leave nothing gets the whole vocabulary.
    A row that has ended is filled up with `pad_token_id`, or with 0 without one. (Without an `eos_token_id`,
    transformers would let it go on until all have ended.)
    """
    keep_scores = config.return_dict_in_generate and config.output_scores
    keep_logits = config.return_dict_in_generate and config.output_logits
    pad = config._pad_token_tensor
    unfinished = torch.ones(len(tokens.ids), dtype=torch.bool, device=tokens.ids.device)
    all_scores, all_logits, live = (), (), np.arange(len(tokens.ids))
    guarded = backbone is not None and len(processors) > 0
    once = any(isinstance(processor, STATEFUL) for processor in processors)
    logits = walk.prefill()
    while True:
        if guarded and once:  # they cannot be asked a second time
            logits = widened(logits, walk.listed, live, backbone)
        scores = processors(tokens.ids, logits.clone() if keep_logits or guarded else logits)
        if guarded and not once:
            again = lost(logits, scores).nonzero()[:, 0].cpu().numpy()
            if len(again):
                logits = widened(logits, walk.listed, again, backbone)
                scores = processors(tokens.ids, logits.clone())
        chosen = pick(scores, sources, live)
        chosen = torch.where(unfinished, chosen, 0 if pad is None else pad.to(chosen.device))
        tokens.append(chosen)
        all_scores += (scores,) if keep_scores else ()
        all_logits += (logits,) if keep_logits else ()
        if streamer is not None:
            streamer.put(chosen.cpu())
        unfinished = unfinished & ~criteria(tokens.ids, all_scores if keep_scores else None)
        live = unfinished.nonzero()[:, 0].cpu().numpy()
        if not len(live):
            break
        logits = walk.step(live)
    if streamer is not None:
        streamer.end()
    return all_scores or None, all_logits or None


def _unsupported(inner, processors, input_ids: Tensor, model_kwargs: dict, kv: str) -> list[str]:
    """Returns what is wrong with what the model and the loop would be given beside the prompt's ids.

    Raises:
        ValueError: embeddings, without ids that anything else could be compared with.
    """
    problems, past_key_values = [], model_kwargs.get("past_key_values")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("generate: inputs_embeds: embeddings are not supported; give the prompt as input_ids alone")
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        problems.append("past_key_values holds tokens: continuing from a cache is not supported; pass the whole prompt")
    elif not _plain(model_kwargs.get("position_ids"), input_ids, model_kwargs.get("attention_mask")):
        problems.append(
            "position_ids are not those of the attention_mask: positions of your own are not supported; leave them out"
        )
    beside = {name: value for name, value in model_kwargs.items() if name not in (*HANDLED, *NEEDLESS)}
    if beside := sorted(
        name
        for name, value in beside.items()
        if isinstance(value, Tensor) or (isinstance(value, list | tuple | dict) and value)
    ):
        problems.append(f"{', '.join(beside)}: the exits see text only, by its input_ids; leave it out")
    names = [type(processor).__name__ for processor in processors if isinstance(processor, STATEFUL)]
    if names and kv == "verify":
        problems.append(
            f"kv='verify' does not go with guidance_scale or SynthID watermarks ({', '.join(names)}), which remember "
            "what they were asked, drafts too; use 'propagate' or 'recompute'"
        )
    if any(getattr(module, "gradient_checkpointing", False) and module.training for module in inner.modules()):
        problems.append(
            "the model is in training mode with gradient checkpointing, which keeps no K/V; call model.eval() first"
        )
    return problems


def _plain(positions: Tensor | None, input_ids: Tensor, mask: Tensor | None) -> bool:
    """Returns whether positions [..., batch, prompt] count the tokens that a mask [batch, prompt] lets in, from 0."""
    if positions is None or (mask is not None and mask.shape != input_ids.shape):  # such a mask is refused anyway
        return True
    # Without padding `generate` leaves out the mask, and its positions may be those of one row for all.
    mask = torch.ones_like(input_ids[:1]) if mask is None else mask.long()
    try:
        return bool(((positions.to(mask.device) == mask.cumsum(-1) - 1) | (mask == 0)).all())
    except RuntimeError:  # of other sizes
        return False


def _misfits(config, input_ids: Tensor, mask: Tensor | None, view: Backbone, kv: str, policy, seed) -> list[str]:
    """Returns what is wrong with a request, by itself and for this model."""
    problems, prompt, limit = [], input_ids.shape[1], view.max_context
    if config.num_beams and config.num_beams > 1:
        problems.append(f"num_beams={config.num_beams}: beam search is not supported; leave it at 1")
    if mask is not None and (mask.shape != input_ids.shape or (mask.long().diff(dim=1) < 0).any()):
        problems.append("attention_mask must be 0 on the left, where a row is padded, and 1 from there on")
    elif mask is not None and prompt and not mask[:, -1].all():
        problems.append("attention_mask leaves a row without a token; give each row one at least")
    if limit is not None and prompt > limit:
        problems.append(f"the prompt has {prompt} tokens, the model's context is {limit}; shorten it")
    elif limit is not None and config.max_length > limit and not view.extends:
        problems.append(
            f"prompt and answer may take {config.max_length} tokens, the model has {limit} learned positions; lower "
            "max_new_tokens"
        )
    if kv not in STRATEGIES:
        problems.append(f"kv={kv!r} is not one of {', '.join(STRATEGIES)}; choose one")
    if not isinstance(policy, ExitPolicy) and len(policy) != len(input_ids):
        problems.append(f"{len(policy)} policies for {len(input_ids)} rows; give one for all, or one for each")
    if not isinstance(policy, ExitPolicy) and kv != "propagate":
        problems.append(f"kv={kv!r} takes one policy for all rows; a policy for each goes with 'propagate'")
    if prompt == 0 or not len(input_ids):
        problems.append("the prompt is empty; give at least one token")
    if not all(isinstance(each, int) for each in (seed if isinstance(seed, Sequence) else [seed or 0])):
        problems.append(f"seed={seed!r}; give one whole number, or one for each row")
    elif isinstance(seed, Sequence) and len(seed) != len(input_ids):
        problems.append(f"{len(seed)} seeds for {len(input_ids)} rows; give one number for all, or one for each")
    if other := [name for name in OTHER if getattr(config, name, None)]:
        problems.append(f"{', '.join(other)}: another way to decode, which does not go with exits; leave it out")
    return problems
