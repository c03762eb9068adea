"""Advantages, losses, packing and the learner."""
