"""Runs model-written Python where it can do no harm, and decides whether it passes its test.

Each program gets two processes: the candidate runs the model's code and only answers calls, the judge runs the test
and reports to mftctl. The candidate sees neither the test nor the way to report, so that it can pass only by
answering right.
"""

from mftctl.evaluation.sandbox.judging import judge_programs
from mftctl.evaluation.sandbox.limits import Limits
from mftctl.evaluation.sandbox.probing import find_sandbox
from mftctl.evaluation.sandbox.programs import Outcome, Program, Verdict
from mftctl.evaluation.sandbox.sandboxes import Kind, Sandbox

__all__ = ["Kind", "Limits", "Outcome", "Program", "Sandbox", "Verdict", "find_sandbox", "judge_programs"]
