"""Learning from positives and unlabeled images: risks, prior, thresholds, scorers, and the fit."""
