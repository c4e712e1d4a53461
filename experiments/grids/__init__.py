"""Many runs with a report."""
