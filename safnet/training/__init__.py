"""Training a model and fitting its refine module: `safnet train` and `safnet fit-refine`. Needs the extra [train]."""
