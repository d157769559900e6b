"""Processes: launching, Slurm, preemption, failure detection, locks."""
