"""Code of the user: registries by name, files and classes that a config names, errors for names of upstream verl."""
