"""transformers' models: loaded by octavo, or by way of ``from_pretrained``."""
