"""Many processes that train together, and the signals that stop them."""
