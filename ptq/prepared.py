"""What runs on one parent have in common and compute once: calibration tokens, and a budget's measurements."""

from dataclasses import replace

from torch import Tensor

from ptq.budget_measure import Measured, measure
from ptq.calibration.data import calibration_batches
from ptq.calibration.given import Given
from ptq.config import CalibrationConfig
from ptq.models.loading import load_tokenizer
from ptq.plan import Plan
from ptq.progress import Progress


class Prepared:
    """Remembers by what a result depends on, so that a run that differs there computes its own."""

    def __init__(self, given: Given | None = None) -> None:
        """``given``: data that stands in for the text of every configuration."""
        self._given = given
        self._batches: dict[tuple[str, CalibrationConfig], list[Tensor]] = {}
        self._measured: dict[str, list[Measured]] = {}

    def batches(self, plan: Plan) -> list[Tensor]:
        """Calibration tokens, ``int64 [B, T]`` each.

        Raises:
            DataError: the text is unreadable or too short, or ids that were given are not the model's.
        """
        key = str(plan.directory), plan.config.calibration
        if key not in self._batches:
            tokenizer = load_tokenizer(plan.directory, plan.config.trust_remote_code)
            batches = calibration_batches if self._given is None else self._given.batches
            self._batches[key] = batches(plan.config.calibration, tokenizer)
        return self._batches[key]

    def measured(self, plan: Plan, progress: Progress) -> list[Measured]:
        """Losses at every width, for runs that differ in nothing but the size of their budget; raises as `measure`."""
        key = repr(replace(plan.config, output="", bits=4, evaluation=None))
        if key not in self._measured:
            self._measured[key] = measure(plan, self.batches(plan), progress)
        return self._measured[key]
