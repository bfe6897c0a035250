"""A plan, executed: bytes are read, quantized and put in their place. Decides nothing."""
