"""The error of a model directory."""


class ModelFilesError(ValueError):
    """A model directory that cannot be loaded. The message names the file, without the directory."""
