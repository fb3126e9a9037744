"""Runs that generate and train at the same time."""
