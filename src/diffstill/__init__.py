"""diffstill: distil diffusion models into smaller and faster students whose guidance stays alive."""

__version__ = "0.1.0"
