"""Measuring a model: distances between sets of images, guidance fidelity, cost. Every number carries its protocol."""
