"""Robust knowledge distillation: losses, the adversary over class weights, and the training loop."""
