"""Decisions, made before a weight is read: what each weight becomes, and in which order bytes are read."""
