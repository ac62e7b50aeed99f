"""Losses of distillation."""
