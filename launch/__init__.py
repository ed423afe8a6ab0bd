"""Where a run happens: the command line, recipes and Ray."""
