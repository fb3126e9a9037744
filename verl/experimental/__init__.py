"""Import paths of upstream verl for user code that extends a run; the implementations are in the other packages."""
