"""Calibration: text to tokens, tokens to activations, activations to the statistics the solvers take."""
