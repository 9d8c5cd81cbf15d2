"""Servers with OpenAI's API, as the source of answers and likelihoods."""
