"""The command line, a file for each thing that people do with it."""
