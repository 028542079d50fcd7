"""Scenes with known truth: made from panoramas, or read from the public data sets."""
