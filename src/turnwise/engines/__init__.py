"""Engines turn token ids into sampled token ids. Import the one you need; this package imports none."""
