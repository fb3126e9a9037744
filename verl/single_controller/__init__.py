"""Ray: where processes run, and calling the same method on all trainer ranks."""
