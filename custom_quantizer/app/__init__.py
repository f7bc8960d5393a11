"""Whole jobs: the pipeline, models and data by name, the demo, the command line."""
