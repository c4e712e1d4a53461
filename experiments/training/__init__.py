"""The step of a training, the loop around it, and what both are made of."""
