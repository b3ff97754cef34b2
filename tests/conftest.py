"""One setting for all tests: generated examples are the same in every run, so that a failure is one of the change."""

from importlib.util import find_spec

if find_spec("hypothesis"):  # a machine lent for a GPU check has pytest and little else
    from hypothesis import settings

    settings.register_profile("fixed", derandomize=True)
    settings.load_profile("fixed")
