"""Checks of a config, one module for each of its sections."""
