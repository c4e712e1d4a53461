"""Long trials of what must never fail, each with its report in ``experiments/results``."""
