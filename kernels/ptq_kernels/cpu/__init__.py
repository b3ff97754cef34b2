"""The product on CPUs: C++ libraries where they were built, and paths in torch only."""
