"""PU-Ray: a trained classifier, a few labeled images and an unlabeled lake in; a small, checked, served student out."""

__version__ = "0.1.0"
