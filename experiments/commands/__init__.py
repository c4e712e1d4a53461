"""The sub-commands of the command line, a file for each: arguments and printing."""
