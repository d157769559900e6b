"""The span head for named entities and its CRF; these import torch."""
