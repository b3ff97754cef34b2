"""AWQ: activation-aware channel scaling. ``python -m ptq.awq --config run.yaml`` runs it on a model."""

from ptq.awq.fold import Fold, apply_fold, find_folds
from ptq.awq.solver import search_clip, search_scales

__all__ = ["Fold", "apply_fold", "find_folds", "search_clip", "search_scales"]
