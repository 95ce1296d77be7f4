"""Checkpoints of other code, to diffusers folders and back."""
