"""What a checkpoint holds, known from its headers alone: no weight is read here."""
