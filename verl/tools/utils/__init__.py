"""Reading tool config files."""
