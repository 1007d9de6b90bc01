"""A study: what it is, where it is kept, what it asks for and what it is told. It knows neither models nor values.

settings    what a study is
storage     where it is kept, that one process at a time owns it, and what it tells of trials
front       points compared, and which are trained with further seeds
study       Optuna's study: asks for points worth training, and is told what became of them
results     what else a study knows: what it is, and what each job came to
jobs        a point and a seed, as what a worker needs to train it
valuing     how points are valued, as the owner sees it
"""
