"""Environments, vectorised evaluation and reference scores; knows nothing of agents."""
