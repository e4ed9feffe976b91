"""One file per method; the file's name is the method's name. See README.md to add one."""
