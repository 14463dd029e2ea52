"""Free generation under a policy, and what the full model says of every token of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from adaptive import losses
from adaptive.policy import ExitPolicy, Trace
from adaptive.prompts import left_pad

# What the full model judges, and what exits learn from, is its own distribution, without what some models ship with.
UNPENALIZED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@dataclass
class Outcome:
    """Answers to prompts under a policy, and what the full model says of them.

    Attributes:
        answers: token ids of each answer.
        trace: what decoding did.
        regret: [rows, tokens] nats, judged by the full model on the same prefix; NaN where a row had ended.
        nll: [rows, tokens] nats, negative log-likelihood of the answer under the full model; NaN likewise.
    """

    answers: list[list[int]]
    trace: Trace
    regret: np.ndarray
    nll: np.ndarray


def answer(
    model,
    prompts: list[list[int]],
    policy: ExitPolicy,
    max_new_tokens: int,
    batch_size: int = 32,
    probe: bool = False,
    note: str = "answering",
) -> tuple[list[list[int]], Trace]:
    """Returns the greedy answers to prompts (token ids) under a policy, and the trace of all of them.

    Args:
        model: the `EarlyExitModel`.
        prompts: token ids of each prompt.
        policy: who leaves where.
        max_new_tokens: most tokens of an answer.
        batch_size: rows generated at once.
        probe: see `EarlyExitModel.generate`.
        note: what the progress bar says.
    """
    answers, traces = [], []
    pad = model.generation_config.pad_token_id
    pad = int(pad if pad is not None else 0)
    for start in tqdm(range(0, len(prompts), batch_size), desc=note, unit="batch", leave=False):
        ids, mask = left_pad(prompts[start : start + batch_size], pad, model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **UNPENALIZED,
            pad_token_id=pad,
            policy=policy,
            probe=probe,
            return_dict_in_generate=True,
        )
        traces.append(out.trace)
        for row, length in zip(out.sequences[:, ids.shape[1] :], out.trace.valid.sum(1), strict=True):
            answers.append(row[: int(length)].tolist())
    return answers, Trace.join(traces)


@torch.no_grad()
def judge(
    model, prompts: list[list[int]], answers: list[list[int]], batch_size: int = 16, note: str = "judging"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the full model's regret and negative log-likelihood of every answer token, [rows, tokens] in nats.

    One teacher-forced pass of the full depth per batch; logits are made for answer positions only.
    """
    width = max(map(len, answers))
    regret, nll = np.full((len(answers), width), np.nan), np.full((len(answers), width), np.nan)
    view = model.view
    # By length: padding costs as much as tokens.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(answers[row]))
    for start in tqdm(range(0, len(prompts), batch_size), desc=note, unit="batch", leave=False):
        chunk = order[start : start + batch_size]
        ids, mask = left_pad([prompts[i] + answers[i] for i in chunk], 0, model.device)
        hidden, calls = view.start(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), None)
        normed = view.norm(view.run(hidden, calls, 0, view.num_layers))
        for row, index in enumerate(chunk):
            count = len(answers[index])
            logits = view.logits(normed[row, -count - 1 : -1]).float()
            said = torch.tensor(answers[index], device=model.device)
            regret[index, :count] = losses.regret(logits, said).cpu().numpy()
            nll[index, :count] = -logits.log_softmax(-1).gather(-1, said[:, None])[:, 0].cpu().numpy()
    return regret, nll


def observe(model, prompts: list[list[int]], policy: ExitPolicy, max_new_tokens: int, batch_size: int = 32) -> Outcome:
    """Returns what free generation under a policy does on these prompts, judged by the full model."""
    answers, trace = answer(model, prompts, policy, max_new_tokens, batch_size)
    regret, nll = judge(model, prompts, answers)
    return Outcome(answers, trace, regret, nll)
