"""Continued pretraining of encoders with a causal detour."""

__version__ = "0.1.0"
