"""Runs the steps: batches, caches, CUDA graphs, draft models."""
