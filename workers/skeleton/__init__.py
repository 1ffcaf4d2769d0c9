"""Architectures of `transformers` without weights: what a checkpoint must hold tensors for."""
