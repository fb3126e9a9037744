"""Base classes of samplers, under upstream verl's path; `verl.utils.dataset.sampler` has the implementation."""

from verl.utils.dataset.sampler import AbstractCurriculumSampler, AbstractSampler

__all__ = ["AbstractCurriculumSampler", "AbstractSampler"]
