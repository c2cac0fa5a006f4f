"""Training and scoring of a model, or of its latter half, on packs."""
