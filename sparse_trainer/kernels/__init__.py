"""Products that skip dead weights, and attention: kernels for the CPU, what torch has for a GPU, and the choice."""
