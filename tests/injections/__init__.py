"""Runs that are killed, asked to stop, starved of disk and damaged, and have to come out as if nothing had happened."""
