"""Files that one can trust: written whole, checked when read."""
