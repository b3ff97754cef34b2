"""Modules that hold packed weights."""

from ptq.nn.fuse import FusedLinear, fuse_linears
from ptq.nn.linear import QuantLinear

__all__ = ["FusedLinear", "QuantLinear", "fuse_linears"]
