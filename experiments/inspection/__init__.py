"""What a checkpoint or a run holds: read, compared, printed and drawn."""
