"""What may be chosen, and what it comes to before anything is trained or scored.

space       search spaces: Python files with a function `suggest`
subjects    what is reduced: the model of a recipe, built when a point is priced
hand        the same: a model in hand, of which all that points ask for is measured once
allotting   widths at a budget, by what narrowing each MLP alone loses
points      what a suggestion comes to: exact cost, pattern, and a key that equal reductions share
choices     walks through a space without training: checks it, finds its cheapest point
goals       objectives and budgets
"""
