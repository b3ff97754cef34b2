"""GPTQ: Hessian-based rounding. ``python -m ptq.gptq --config run.yaml`` runs it on a model."""

from ptq.gptq.solver import Factor, SolveResult, factorize, gptq_solve

__all__ = ["Factor", "SolveResult", "factorize", "gptq_solve"]
