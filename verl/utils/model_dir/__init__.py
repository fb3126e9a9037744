"""Readers of a Hugging Face model directory: names, shapes and sizes. They import no torch for safetensors files."""
