"""What ``sparse-trainer benchmark`` measures, a module for each sub-command."""
