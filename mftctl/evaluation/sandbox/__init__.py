"""Runs model-written Python in a sandbox and decides whether it passes its test.

Each program gets two processes: the candidate runs the model's code and only answers calls; the judge runs the test
and reports to mftctl. The candidate has access to neither the test nor the report, so it can pass only by answering
correctly.
"""
