"""Losses, optimizers and the loop of a training job."""
