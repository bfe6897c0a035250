"""Where every element of a parameter comes from, and which are still to come."""
