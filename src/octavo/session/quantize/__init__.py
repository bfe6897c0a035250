"""Boxes that come one by one, quantized into storage that exists."""
