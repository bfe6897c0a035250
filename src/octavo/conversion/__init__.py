"""Checkpoints in FP8: how their readers want them, written, handed out and verified."""
