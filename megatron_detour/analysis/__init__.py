"""What the detour changes in a model: drift, persistence, transplants, probes, needles, and the choice of layers."""
