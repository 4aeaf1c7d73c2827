"""Checkpoints on disk: whether they are whole, and the same ones in another form."""
