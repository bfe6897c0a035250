"""Every model type of transformers, tiny: loaded, run, converted and read back. See `sweep.run`."""
