"""Runs that generate the next batch while they train on the present one."""
