"""A checkpoint, known from its headers alone: no weight is read here."""
