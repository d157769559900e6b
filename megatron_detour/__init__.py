"""Continued pretraining of encoders with a causal detour."""

import logging

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a command shows what is logged: log.py
