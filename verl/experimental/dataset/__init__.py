"""Samplers, under upstream verl's path; `verl.utils.dataset.sampler` has the implementation."""
