"""Tuning a finished block by gradient: scales, zero points and codes, against the float block's output."""

from ptq.refine.block import float_block, refine_block

__all__ = ["float_block", "refine_block"]
