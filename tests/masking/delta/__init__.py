"""Tests of delta files."""
