"""Fuzzing of every parser that sees bytes of a peer or of a vendor's file: `make fuzz TARGET=... SECONDS=...`."""
