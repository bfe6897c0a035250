"""A small real model, loaded as FP8 before the reader's eyes."""
