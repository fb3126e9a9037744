"""Ray: process placement, typed calls to actors, and calls to all trainer ranks at once."""
