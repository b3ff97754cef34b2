"""Modules that hold packed weights."""

from ptq.nn.linear import QuantLinear

__all__ = ["QuantLinear"]
