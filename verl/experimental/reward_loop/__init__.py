"""Import paths of upstream verl for reward managers."""
