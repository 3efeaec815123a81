"""Whole jobs: from a recipe to a finished run folder. The command line only parses and prints."""
