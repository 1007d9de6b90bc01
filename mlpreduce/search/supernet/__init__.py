"""A supernet that says which points a study trains.

candidates  points as its sub-models, and how well it ranks
ranking     the supernet in a study
"""
