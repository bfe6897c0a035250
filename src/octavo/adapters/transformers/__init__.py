"""transformers' models, loaded by octavo itself or on the way through ``from_pretrained``."""
