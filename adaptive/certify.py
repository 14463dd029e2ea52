"""Calibration on a model: survey at full depth, choose thresholds, rehearse them, certify them in free generation.

The prompts that choose and the prompts that certify are disjoint. Harm is judged per generated token by the full
model on the same prefix, and averaged per prompt: prompts are what is exchangeable, tokens of one answer are not.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adaptive import calibration
from adaptive.calibration import BY_TOKEN, Certificate
from adaptive.choice import Aim, Request, choose, rehearse
from adaptive.data import digest
from adaptive.outcomes import Outcome, answer, observe
from adaptive.policy import ExitPolicy
from adaptive.prompts import Prompt, distinct, encode, is_ids, unpadded
from adaptive.storage import model_digest
from adaptive.survey import Survey, loss_per_prompt, survey

logger = logging.getLogger(__name__)
BOLDER = ((0.95, 0.8), (1.0, 0.6))  # `Aim.caution` and `.sure` of what may be tried once the first attempt has passed
RETREAT = 0.7  # the second attempt allows this share of the harm that the first one was promised


class Refused(ValueError):
    """No certificate: too few prompts, or no policy that meets the risk."""


def calibrate(
    model,
    prompts: Sequence[Prompt],
    risk: float | None = 0.02,
    delta: float = 0.05,
    *,
    selection: Survey | Sequence[Prompt] | None = None,
    tokenizer=None,
    **settings,
) -> Certificate:
    """Returns a certificate, and gives its thresholds to the model as its policy.

    With probability at least 1 - delta over the draw of the certification prompts, the expected harm of a prompt like
    them, different ones counting once each, is at most `certificate.certified`; that is at most `risk` if a risk was
    asked for.

    Args:
        model: the `EarlyExitModel`.
        prompts: what the model will be asked: strings, chat messages or token ids. Without `selection`, a quarter of
            them choose thresholds and the others certify; a prompt never does both.
        risk: largest expected harm per token (epsilon). Ignored when `budget` is given.
        delta: probability with which the certificate may be wrong.
        selection: prompts to choose thresholds on, or a `Survey` of them; all `prompts` then certify.
        tokenizer: of the backbone; loaded from its folder if None.
        **settings:
            budget: FLOPs per token relative to full depth; the thresholds of least harm within it are certified.
            harm: "regret" (default: the full model gives the chosen token over `tolerance` nats less than its
                best), "disagreement" (another token than its best), "sequence" (1 - ROUGE-L against its own answer),
                or a callable of (answer ids, the full model's answer ids) with values in [0, 1].
            tolerance: of regret, 0.25 nats.
            bound: "wsr" (default), "hb" or "crc" (which controls the mean only); see `calibration`.
            max_new_tokens: length, 64, up to which answers are generated and vouched for.
            batch_size: rows generated at once, 32.
            bolder: whether a risk that was certified at the first attempt is tried with up to two cheaper choices,
                for as many more generations, False. What is then vouched for is the risk itself, not a bound below
                it. Not with the bound "crc", which says nothing of single draws.
            seed: of the split and of the bound's order, 0.

    Raises:
        ValueError: too few prompts (with the number needed), a setting that is not allowed, a risk that no policy met.
    """
    defaults = {"budget": None, "harm": "regret", "tolerance": 0.25, "bound": "wsr", "max_new_tokens": 64,
                "batch_size": 32, "bolder": False, "seed": 0}  # fmt: skip
    if unknown := settings.keys() - defaults.keys():
        raise ValueError(f"calibrate: {sorted(unknown)} are no settings; there are {sorted(defaults)}")
    request = Request(risk=risk, delta=delta, **defaults | settings)
    choosing, certifying = _divide(model, prompts, selection, tokenizer, request)
    if not isinstance(selection, Survey):
        selection = survey(model, choosing, request.max_new_tokens, request.batch_size)
    certificate = _attempt(model, selection, certifying, request)
    model.certify(certificate)
    return certificate


def _divide(model, prompts, selection, tokenizer, request: Request) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the prompts, as ids, that choose and those that certify; all different."""
    asked = list(prompts) + ([] if selection is None or isinstance(selection, Survey) else list(selection))
    if tokenizer is None and any(hasattr(prompt, "__len__") and not is_ids(prompt) for prompt in asked):
        tokenizer = load_tokenizer(model)
    encoded = distinct(encode(prompts, tokenizer))
    order = np.random.default_rng(request.seed).permutation(len(encoded))
    cut = 0 if selection is not None else len(encoded) // 4
    certifying, choosing = [encoded[i] for i in order[cut:]], [encoded[i] for i in order[:cut]]
    if selection is not None:
        given = isinstance(selection, Survey)
        choosing = unpadded(selection.prompts) if given else distinct(encode(selection, tokenizer))
    if both := len({tuple(p) for p in choosing} & {tuple(p) for p in certifying}):
        raise ValueError(f"calibrate: {both} prompts would both choose and certify; leave them out of one")
    if request.budget is None:
        _require_enough(len(certifying), selection is None, request)
    if not choosing:
        raise ValueError(f"calibrate: {len(encoded)} prompts leave none to choose thresholds on; give at least 4")
    return choosing, certifying


def _require_enough(certifying: int, quartered: bool, request: Request) -> None:
    first = calibration.spend(request.delta, 2)[0]
    needed = calibration.needed_prompts(request.risk, first, request.bound)
    if certifying < needed:
        total = -(-4 * needed // 3) if quartered else needed
        raise Refused(
            f"{certifying} different prompts certify{', a quarter of them chooses' if quartered else ''}; at least "
            f"{needed} must, so give {total} or more, to certify a risk of {request.risk} at delta {request.delta} "
            f"with the bound `{request.bound}` even if no prompt is harmed (the first of two attempts has delta "
            f"{first:g}); give more prompts, or raise the risk or delta"
        )


def _attempt(model, found: Survey, prompts: list[list[int]], request: Request) -> Certificate:
    """Returns the certificate of the first choice that passes; the second one is more careful than the first."""
    reference = None
    if request.harm not in BY_TOKEN:
        full = ExitPolicy.full(model.num_exits)
        reference = answer(model, prompts, full, request.max_new_tokens, request.batch_size)[0]
    by_risk, most, epsilon = request.budget is None, request.risk, request.risk if request.budget is None else 1.0
    rehearsed, deltas = None, calibration.spend(request.delta, 2) if by_risk else [request.delta]
    for attempt, delta in enumerate(deltas):
        if by_risk and len(prompts) < calibration.needed_prompts(request.risk, delta, request.bound):
            break  # the second attempt's smaller delta needs more
        again = attempt == 0
        chosen, rehearsed = _rehearsed(model, found, request, len(prompts), Aim(delta, most), rehearsed, again)
        if by_risk and not np.isfinite(chosen[0]).any():
            logger.warning("no exit can be opened on %d prompts at a risk of %s: never leaving", len(prompts), epsilon)
        passed, tested = _tested(model, prompts, request, reference, delta, *chosen)
        if passed and attempt == 0 and by_risk and request.bolder:
            return _bolder(model, found, prompts, request, reference, rehearsed, tested)
        if passed:
            return tested
        logger.warning("%s: bound %.4f on a mean harm of %.4f; retreating", chosen[0], tested.certified, tested.mean)
        most = tested.predicted["harm"] * RETREAT
    raise Refused(
        f"no policy was certified at `risk`={request.risk}, `delta`={request.delta}: the last bound was "
        f"{tested.certified:.4f} on {tested.n} prompts (mean harm {tested.mean:.4f}); raise the risk, give more "
        "prompts, or train longer"
    )


def _rehearsed(model, found: Survey, request: Request, n: int, aim: Aim, rehearsed: tuple | None, again: bool):
    """Returns what `choose` does, and the rehearsal behind it: with `again` that of its own first thoughts."""
    chosen = choose(model, found, request, n, aim, rehearsed)
    if again and request.budget is None and request.harm in BY_TOKEN and np.isfinite(chosen[0]).any():
        rehearsed = rehearse(model, found, request, chosen[0])
        chosen = choose(model, found, request, n, aim, rehearsed)
    return chosen, rehearsed


def _bolder(model, found, prompts, request: Request, reference, rehearsed, certificate: Certificate) -> Certificate:
    """Returns the certificate of the last of ever bolder choices that passes, the given choice's where none does.

    Survey and rehearsals fix the choices, so they form a sequence that was there before any harm on these prompts was
    seen, and each is tested at the first one's delta only if all before it passed. Whichever comes first of those whose
    harm is above the risk passes with probability at most that delta (fixed sequence testing, see LTT). What is vouched
    for is therefore the risk, whichever choice it comes to, the first included: of several bounds, each may be wrong
    with probability delta.
    """
    delta, said = calibration.spend(request.delta, 2)[0], "%s: bound %.4f on a mean harm of %.4f; %s"
    logger.warning(said, certificate.thresholds, certificate.certified, certificate.mean, "passed, going on")
    certificate = replace(certificate, certified=request.risk)
    for caution, sure in BOLDER:
        aim = Aim(delta, request.risk, caution, sure)
        chosen, rehearsed = _rehearsed(model, found, request, len(prompts), aim, rehearsed, True)
        if list(chosen[0]) == certificate.thresholds:
            continue
        passed, tested = _tested(model, prompts, request, reference, delta, *chosen)
        logger.warning(said, chosen[0], tested.certified, tested.mean, "passed" if passed else "the one before stays")
        if not passed:
            break
        certificate = replace(tested, certified=request.risk)
    return certificate


def _tested(model, prompts, request: Request, reference, delta, thresholds, promise) -> tuple[bool, Certificate]:
    """Returns whether the thresholds pass, and the certificate that they then have."""
    outcome = observe(model, prompts, ExitPolicy(thresholds), request.max_new_tokens, request.batch_size)
    harms = loss_per_prompt(request.harm, request.tolerance, outcome, reference)
    generator = np.random.default_rng(request.seed)
    epsilon = request.risk if request.budget is None else 1.0
    passed, upper = calibration.certify(harms, epsilon, delta, request.bound, generator=generator)
    return bool(passed), _certificate(model, request, prompts, outcome, harms, thresholds, upper, promise)


def _certificate(model, request: Request, prompts, outcome: Outcome, harms, thresholds, upper, promise) -> Certificate:
    # Tokens whose row has not left before: their K/V are the full model's own, computed by other arithmetic.
    left = (outcome.trace.taken < model.num_exits) & (np.arange(outcome.trace.taken.shape[1]) > 0)
    full = (outcome.trace.taken == model.num_exits) & ~np.logical_or.accumulate(left, axis=1)
    return Certificate(
        kind="budget" if request.budget is not None else "risk",
        epsilon=None if request.budget is not None else request.risk,
        delta=request.delta,
        n=len(harms),
        bound=request.bound,
        certified=float(upper),
        mean=float(harms.mean()),
        harm=request.harm if isinstance(request.harm, str) else getattr(request.harm, "__name__", "callable"),
        tolerance=request.tolerance if request.harm == "regret" else None,
        max_new_tokens=request.max_new_tokens,
        floor=float((outcome.regret[full] > 0).mean()) if full.any() else None,
        thresholds=list(thresholds),
        saved=1 - model.costs.price(outcome.trace).relative_flops,
        predicted=promise,
        seed=request.seed,
        data_digest=digest(repr(prompts).encode()),
        model_digest=model_digest(model),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
    )


def load_tokenizer(model):
    """Returns the tokenizer that lies with the model's backbone."""
    from transformers import AutoTokenizer

    from adaptive.pretrained import resolve

    if not model.view.inner.name_or_path:
        raise ValueError("the backbone came without a name, so its tokenizer cannot be found; pass `tokenizer`")
    return AutoTokenizer.from_pretrained(resolve(str(model.view.inner.name_or_path)))
