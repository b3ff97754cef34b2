"""Errors a person can act on. Every message says what was required, what was found and what to do."""


class PtqError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


class ConfigError(PtqError):
    """The run was described wrongly: an unknown key, a wrong type, an impossible combination (exit code 2)."""


class GateError(PtqError):
    """A checkpoint that a condition of ``--fail-if`` rules out (exit code 3)."""


class DataError(PtqError):
    """Calibration or evaluation text that cannot be read, or that is too short."""


class FormatError(PtqError):
    """A checkpoint file that is missing, truncated, inconsistent, or that a format cannot express."""


class NumericsError(PtqError):
    """NaN, infinity, or a matrix that cannot be factorised."""


class RankError(PtqError):
    """Another process of the same run has ended."""


class UnsupportedModelError(PtqError):
    """A model whose structure could not be discovered."""
