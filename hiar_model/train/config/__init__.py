"""Recipes of training."""
