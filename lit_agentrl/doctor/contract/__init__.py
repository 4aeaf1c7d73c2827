"""The invariance contract: one optimiser step under many settings, whose loss and gradient must be the same."""
