"""Recipes, run folders, and the results in them."""
