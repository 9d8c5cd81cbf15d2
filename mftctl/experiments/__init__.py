"""Recipes in, run folders out."""
