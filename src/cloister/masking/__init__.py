"""Frozen linear layers on an untrusted accelerator: exact integer products behind a one-time pad, checked."""
