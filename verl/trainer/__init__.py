"""The command line of training, the config files and the training loop."""
