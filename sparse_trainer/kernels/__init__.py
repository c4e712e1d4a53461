"""Products that skip dead weights: kernels for the CPU, what torch has for a GPU, and the choice between them."""
