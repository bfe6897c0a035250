"""A loader, watched: what it does to tensors, and whose values it writes."""
