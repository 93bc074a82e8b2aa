"""Studies: many trainings from one file, with the same number of rate trials for each method.

A trial is an ordinary run of `molf train`. Optuna's storage holds the state of all trials.
Importing this package imports neither torch nor optuna.
"""
