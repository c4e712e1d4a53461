"""A trained network made small: what it is, what of it goes, and what that came to."""
