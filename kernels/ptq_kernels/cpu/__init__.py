"""The product on CPUs, in torch only."""
