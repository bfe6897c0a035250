"""Engines with loaders of their own share this: dry runs, places, coverage. Imports no engine."""
