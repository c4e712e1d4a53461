"""What one runs: joins the networks of ``models`` with the engine of ``sparse_trainer``."""
