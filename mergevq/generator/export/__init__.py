"""A generator as graphs, and whole models as folders that run without this package."""
