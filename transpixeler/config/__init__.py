"""Say what a user may set: every key with its limits, read from YAML and the command line, told to editors."""
