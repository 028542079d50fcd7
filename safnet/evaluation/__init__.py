"""Scores of models and classical baselines on the public data sets: `safnet evaluate`. Needs the extra [eval]."""
