"""Readers of a Hugging Face model directory: names, shapes and sizes. Imports no torch."""
