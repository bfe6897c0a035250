"""Adapters to other libraries and engines, each imported only when it is used."""
