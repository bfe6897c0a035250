"""Fuzzing: whatever octavo reads of others is given to it almost right. `CONTRIBUTING.md` says how to run it."""
