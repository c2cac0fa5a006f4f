"""Adapters as PEFT tuners: what of a model is trained."""
