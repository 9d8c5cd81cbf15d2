"""Runs model-written Python where it can do no harm, and decides whether it passes its test.

Each program gets two processes: the candidate runs the model's code and only answers calls, the judge runs the test
and reports to mftctl. The candidate sees neither the test nor the way to report, so that it can pass only by
answering right.
"""

from mftctl.evaluation.sandbox.find import find_sandbox
from mftctl.evaluation.sandbox.judge import judge_programs
from mftctl.evaluation.sandbox.kinds import Kind, Sandbox
from mftctl.evaluation.sandbox.program import Limits, Outcome, Program, Verdict

__all__ = ["Kind", "Limits", "Outcome", "Program", "Sandbox", "Verdict", "find_sandbox", "judge_programs"]
