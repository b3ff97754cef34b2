"""Tuning what a solver chose by gradient: scales, zero points and codes of a block, or of a whole model."""

from ptq.refine.block import float_block, refine_block
from ptq.refine.model import refine_model

__all__ = ["float_block", "refine_block", "refine_model"]
