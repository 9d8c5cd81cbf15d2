"""Losses on a plane through three models."""
