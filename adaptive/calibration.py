"""Bounds on the expected harm, from one number per prompt, and the certificate that states them.

The exchangeable unit is a prompt: its loss is one number in [0, 1], the mean harm over its generated tokens. What is
certified was chosen (see `ranking`) on other prompts.
WSR: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSSB 2023. RCPS: Bates et al.,
"Distribution-free, risk-controlling prediction sets", JACM 2021. LTT: Angelopoulos et al., "Learn then test", 2021.
CRC: Angelopoulos et al., "Conformal risk control", 2022.
"""

import bisect
import dataclasses
import json
import math
import pathlib

import numpy as np


def wsr_bound(losses, delta):
    """Upper bound on the mean of losses [prompts] in [0, 1] that holds with probability at least 1 - delta.

    A gambler bets, before seeing each loss, that the mean lies below m. If it does not, the capital
    prod(1 + bet_i (m - loss_i)) is a non-negative supermartingale and reaches 1 / delta with probability at most delta
    (WSR section 4; one-sided, predictable plug-in bets: RCPS section 3.1.3, Prop. 5). The bound is the smallest m where
    it does. It depends on the order of the losses: shuffle them with a generator that has not seen them.
    """
    losses, n = _checked_losses(losses, delta), len(losses)
    count = np.arange(2, n + 2)
    mean = (0.5 + np.cumsum(losses)) / count
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / count
    bets = np.sqrt(2 * math.log(1 / delta) / (n * np.append(0.25, variance[:-1])))  # [prompts], each from the past

    def rejected(m):
        """Whether a mean of m is ruled out."""
        # RCPS caps bets at 1. Up to 1 / (1 - m) stays valid and needs fewer prompts where harm is rare; the 0.99 leaves
        # capital after a loss of 1. As the cap grows with m the capital is monotone in m, which bisection relies on.
        capital = np.cumsum(np.log1p(np.minimum(bets, 0.99 / (1 - m)) * (m - losses)))
        return capital.max() >= math.log(1 / delta)

    return _smallest(rejected)


def hoeffding_bentkus_bound(losses, delta):
    """Upper bound on the mean of losses [prompts] in [0, 1] that holds with probability at least 1 - delta.

    Inverts p(m) = min(exp(-n h1(mean, m)), e P[Binomial(n, m) <= ceil(n mean)]) (RCPS section 3.1.2; LTT).
    """
    losses, n = _checked_losses(losses, delta), len(losses)
    mean = float(losses.mean())
    # A sum of floats that ends a hair above an integer must not count as one more failure.
    hits = np.arange(math.ceil(n * mean - 1e-9) + 1)
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in hits])

    def rejected(m):
        """Whether a mean of m is ruled out."""
        above = max(m, mean)
        hoeffding = -n * sum(p * math.log(p / q) for p, q in ((mean, above), (1 - mean, 1 - above)) if p > 0)
        bentkus = 1 + np.logaddexp.reduce(log_choose + hits * math.log(m) + (n - hits) * math.log1p(-m))
        return min(hoeffding, bentkus) <= math.log(delta)

    return _smallest(rejected)


def crc_bound(losses, delta):
    """(n mean + 1) / (n + 1): bounds the mean only on average over draws of the prompts and IGNORES delta (CRC)."""
    losses = _checked_losses(losses, delta)
    return float((losses.sum() + 1) / (len(losses) + 1))


BY_TOKEN = ("regret", "disagreement")  # harms of a token; others are of a whole answer
BOUNDS = {"wsr": wsr_bound, "hb": hoeffding_bentkus_bound, "crc": crc_bound}


def require(advice, *checks):
    """Raises one ValueError with the message of every failed (passed, message)."""
    problems = [message for passed, message in checks if not passed]
    if problems:
        raise ValueError("; ".join(problems) + f"; {advice}")


def _checked_losses(losses, delta, epsilon=0.5, bound="wsr"):
    losses = np.asarray(losses, dtype=np.float64)
    fits = losses.ndim == 1 and losses.size > 0 and np.all((losses >= 0) & (losses <= 1))
    require(
        "average the harm within each prompt, or correct the call",
        (fits, f"`losses` has shape {losses.shape}; allowed: one number in [0, 1] per prompt, no NaN"),
        (0 < delta < 1, f"`delta` is {delta}; allowed: above 0 and below 1"),
        (0 < epsilon <= 1, f"`epsilon` is {epsilon}; allowed: above 0 and at most 1"),
        (bound in BOUNDS, f"`bound` is {bound!r}; allowed: {', '.join(BOUNDS)}"),
    )
    return losses


def _smallest(rejected):
    """Smallest m from which on `rejected(m)` holds, at most 1e-8 above it; 1.0 when there is none."""
    low, high = 0.0, 1.0
    for _ in range(27):
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def needed_prompts(epsilon, delta, bound="wsr"):
    """Smallest number of prompts on which even zero harm certifies a mean of at most epsilon.

    With a true mean mu, no bound valid for every distribution in [0, 1] certifies reliably on fewer prompts than about
    log(1 / delta) / log((1 - mu) / (1 - epsilon)): aim well below epsilon when prompts are few.
    """
    _checked_losses([0], delta, epsilon, bound)
    high = 1
    while BOUNDS[bound](np.zeros(high), delta) > epsilon:
        high *= 2
    return bisect.bisect_left(
        range(high), True, lo=max(1, high // 2), key=lambda n: BOUNDS[bound](np.zeros(n), delta) <= epsilon
    )


def certify(losses, epsilon, delta, bound="wsr", *, generator):
    """(passed, upper): whether losses [prompts] in [0, 1] certify a mean of at most epsilon at delta, and their bound.

    Holds for prompts with no part in choosing what is certified; generator (np.random.Generator) shuffles their losses.
    """
    losses = generator.permutation(_checked_losses(losses, delta, epsilon, bound))
    upper = BOUNDS[bound](losses, delta)
    return upper <= epsilon, upper


def spend(delta, attempts):
    """List of one delta per attempt, each a third of the one before: [0.75 delta, 0.25 delta] for two.

    Attempt i errs with probability at most delta_i, so one of them does with at most their sum, delta (union bound).
    All may use the same prompts, if all that is to be tried was fixed before their harm was seen.
    """
    shares = 3.0 ** -np.arange(attempts)
    return [float(delta * share) for share in shares / shares.sum()]


def rouge_l(a, b):
    """ROUGE-L F1 of two lists of token ids, in [0, 1]; 1 when both are empty (Lin, "ROUGE", 2004, section 3.1)."""
    # Longest common subsequence, one row of the usual table as the bits of one integer (Hyyro, 2004).
    places, row = {}, (1 << len(a)) - 1
    for i, token in enumerate(a):
        places[int(token)] = places.get(int(token), 0) | 1 << i
    for token in b:
        matches = row & places.get(int(token), 0)
        row = (row + matches | row - matches) & (1 << len(a)) - 1
    return 2 * (len(a) - row.bit_count()) / (len(a) + len(b)) if len(a) or len(b) else 1.0


@dataclasses.dataclass
class Certificate:
    """What calibration vouches for; written as strict JSON, in which an infinite threshold is null."""

    kind: str  # "risk", or "budget": then the harm was certified, not chosen
    epsilon: float | None  # mean harm allowed; None for a budget
    delta: float
    n: int  # prompts certified on
    bound: str  # key of BOUNDS
    certified: float  # upper bound on the expected harm
    mean: float  # harm found on the n prompts
    harm: str
    tolerance: float | None  # nats, for "regret"
    max_new_tokens: int  # length of the answers vouched for
    floor: float | None  # share of tokens on which two runs of the full model disagree
    thresholds: list  # per exit; inf: never leave
    saved: float  # share of the full depth's FLOPs saved on the n prompts
    predicted: dict  # what the cached passes promised, by name
    seed: int
    data_digest: str
    model_digest: str
    versions: dict  # package: version

    def check(self, model_digest):
        """None, or a warning when the weights are not those that were certified."""
        return (
            None
            if model_digest == self.model_digest
            else (
                f"certificate is for weights {self.model_digest}, the model has {model_digest}: the bound of "
                f"{self.certified:.4g} on its {self.harm} harm does not hold; calibrate this model"
            )
        )

    def save(self, path):
        """Writes the certificate; an earlier file stays whole if that fails."""
        thresholds = [None if np.isposinf(t) else float(t) for t in self.thresholds]
        text = json.dumps(
            dataclasses.asdict(self) | {"thresholds": thresholds}, indent=2, allow_nan=False, default=np.generic.item
        )
        temporary = pathlib.Path(f"{path}.tmp")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path):
        """The certificate at `path`.

        Raises:
            ValueError: not strict JSON, or keys unknown or missing.
        """
        try:
            values = dict(json.loads(pathlib.Path(path).read_text("utf-8"), parse_constant=int))  # int refuses NaN
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no certificate ({error}); allowed: a JSON object; calibrate again") from error
        names = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(values.keys() - names), sorted(names - values.keys())
        require(
            "calibrate again",
            (
                not unknown + missing,
                f"{path} has unknown keys {unknown} and lacks {missing}; allowed: exactly {', '.join(sorted(names))}",
            ),
        )
        values["thresholds"] = [math.inf if t is None else float(t) for t in values["thresholds"]]
        return cls(**values)
