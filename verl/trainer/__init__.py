"""The command line, the config and the training loops."""
