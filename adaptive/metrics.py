"""Metrics of early exit as `evaluate.Metric`s, loaded without a hub: `metrics.load("regret").compute(...)`.

They combine with others (`evaluate.combine([metrics.load("regret"), evaluate.load("path/to/rouge.py")])`) and add up
over batches and processes like those (`add_batch`, `compute`). Inputs are one number per token.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

_NUMBER, _WHOLE = datasets.Value("float64"), datasets.Value("int64")


class _TokenMetric(evaluate.Metric):
    """A metric over columns of one number per token; a subclass says which, and what they make."""

    columns: dict = {}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__.split("\n")[0],
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(self.columns),
        )


class ExitAgreement(_TokenMetric):
    """Share of tokens on which an exit says what the full model says.

    Args:
        predictions: token ids of the exit.
        references: token ids of the full model on the same prefixes.

    Returns:
        `exit_agreement`, in [0, 1].
    """

    columns = {"predictions": _WHOLE, "references": _WHOLE}

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"exit_agreement": float(np.mean(np.equal(predictions, references)))}


class Regret(_TokenMetric):
    """How much less likely than its best token the full model finds those that were said.

    Args:
        predictions: log-probability in nats that the full model gives to each token said.
        references: that of its own best token on the same prefix.
        tolerance: regret in nats up to which a token does no harm.

    Returns:
        `regret`, the mean in nats, and `harm`, the share of tokens above the tolerance.
    """

    columns = {"predictions": _NUMBER, "references": _NUMBER}

    def _compute(self, predictions, references, tolerance: float = 0.25) -> dict[str, float]:
        lost = np.subtract(references, predictions)
        return {"regret": float(lost.mean()), "harm": float((lost > tolerance).mean())}


class ExpectedDepth(_TokenMetric):
    """Mean number of blocks that tokens went through.

    Args:
        predictions: depth of each token, as `Trace.depth[Trace.valid]`.
        layers: blocks of the full model; None leaves out the share.

    Returns:
        `expected_depth` in blocks, and `depth_share` of the full depth.
    """

    columns = {"predictions": _WHOLE}

    def _compute(self, predictions, layers: int | None = None) -> dict[str, float]:
        depth = float(np.mean(predictions))
        return {"expected_depth": depth} | ({} if layers is None else {"depth_share": depth / layers})


class RelativeFlops(_TokenMetric):
    """FLOPs spent over those of the full depth on the same tokens.

    Args:
        predictions: FLOPs of each token, as `Price.flops` has them.
        references: at full depth, `Price.full_flops`.

    Returns:
        `relative_flops`: below 1 where something was saved.
    """

    columns = {"predictions": _NUMBER, "references": _NUMBER}

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"relative_flops": float(np.sum(predictions) / np.sum(references))}


class GateCalibrationError(_TokenMetric):
    """Expected calibration error of gate scores as probabilities of doing no harm.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2, equation 3, with equally wide bins.

    Args:
        predictions: scores in [0, 1].
        references: 1 where leaving did no harm, else 0.
        bins: number of bins.

    Returns:
        `gate_calibration_error`, in [0, 1].
    """

    columns = {"predictions": _NUMBER, "references": _WHOLE}

    def _compute(self, predictions, references, bins: int = 10) -> dict[str, float]:
        scores = np.asarray(predictions, dtype=np.float64)
        place = np.minimum((scores * bins).astype(int), bins - 1)
        gaps = np.bincount(place, weights=np.asarray(references) - scores, minlength=bins)
        return {"gate_calibration_error": float(np.abs(gaps).sum() / len(scores))}


METRICS = {
    "exit_agreement": ExitAgreement,
    "regret": Regret,
    "expected_depth": ExpectedDepth,
    "relative_flops": RelativeFlops,
    "gate_calibration_error": GateCalibrationError,
}


def load(name: str, **kwargs) -> evaluate.Metric:
    """Returns a metric.

    Args:
        name: one of `METRICS`.
        **kwargs: for `evaluate.Metric` (num_process, process_id, experiment_id, ...).

    Raises:
        ValueError: no metric of that name.
    """
    if name not in METRICS:
        raise ValueError(f"there is no metric `{name}`; there are {', '.join(METRICS)}")
    return METRICS[name](**kwargs)
