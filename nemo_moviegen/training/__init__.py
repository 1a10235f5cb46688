"""Training on NeMo Lightning: the only room that knows it."""
