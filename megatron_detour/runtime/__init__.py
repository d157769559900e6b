"""Processes: launch, Slurm, preemption, failures of other ranks, locks."""
