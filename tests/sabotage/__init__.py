"""Mutations of one line each, and the tests that must notice them: see `tests.sabotage.run`."""
