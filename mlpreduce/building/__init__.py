"""Reduced models that are built anew: by name, from a file, or as a file for others."""
