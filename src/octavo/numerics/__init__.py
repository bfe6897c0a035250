"""The numbers: how a weight is rounded, and which elements share a scale."""
