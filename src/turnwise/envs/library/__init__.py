"""Environments that come with Turnwise, one file each, the teacher beside the rules."""
