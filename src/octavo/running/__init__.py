"""Modules that hold FP8 weights, and the products that they compute."""
