"""Modules of a client's own, written once and built on shared weights by everybody else."""
