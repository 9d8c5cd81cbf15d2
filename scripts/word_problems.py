"""Synthetic arithmetic word problems in two wordings, with a chain of thought that ends as in GSM8K, and preferences.

A problem consists of a start, a few events that each change a running number, and an ending. The built-in checkpoint is
pre-trained on `broad` problems (plain arithmetic and simple stories) and fine-tuned on `market` problems (different
verbs, number words, longer chains and irrelevant sentences). Only the standard library is used, and the same seed
always gives the same problems.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

Operator = Literal["+", "-", "*", "/"]
Domain = Literal["broad", "market"]

SPLITS = {"train": 1500, "validation": 400, "test": 1000}
PREFERENCES = {"preferences": 600, "preferences_validation": 200}
RETAINED_PROBLEMS = 800
CORPUS_PROBLEMS = 64_000
SEED = 0
LARGEST = 150
LARGEST_FACTOR = 9
NAMES = (
    "Ana",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ivo",
    "June",
    "Kai",
    "Lena",
    "Max",
    "Nora",
    "Omar",
    "Pia",
)
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "plums", "roses", "shells", "stamps", "stones", "tickets")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its answer, with one line of arithmetic per step and `#### <number>` at the end."""

    question: str
    answer: str

    @property
    def key(self) -> str:
        """The question in lower case with single spaces, for comparing questions."""
        return " ".join(self.question.lower().split())


@dataclass(frozen=True, slots=True)
class Event:
    """A change of the running number.

    Attributes:
        operator: Operation on the running number and the operand.
        texts: Alternative wordings, with `{who}`, `{n}` (the operand) and `{items}`.
        operand: The operand if the wording fixes it ("half of"); otherwise it is drawn at random.
    """

    operator: Operator
    texts: tuple[str, ...]
    operand: int | None = None


@dataclass(frozen=True, slots=True)
class Wording:
    """The sentences used in problems of one domain.

    Attributes:
        starts: Openings that state the first number as `{a}`.
        products: Openings that state the first number as a product of `{a}` and `{b}`.
        events: Possible events.
        asides: Sentences with an irrelevant number `{n}`.
        questions: Closing questions about the running number.
        comparisons: Closing questions about the sum with someone who has `{n}` more (`+`) or fewer (`-`).
    """

    starts: tuple[str, ...]
    products: tuple[str, ...]
    events: tuple[Event, ...]
    asides: tuple[str, ...]
    questions: tuple[str, ...]
    comparisons: tuple[tuple[Operator, str], ...]


BROAD = Wording(
    starts=("{who} has {a} {items}.", "There are {a} {items} in a bag.", "{who} starts with {a} {items}."),
    products=("{who} has {a} bags with {b} {items} in each.", "There are {a} rows of {b} {items}."),
    events=(
        Event("+", ("{who} gets {n} more.", "{who} finds {n} {items}.", "Then {n} more are added.")),
        Event("-", ("{who} gives away {n}.", "{who} loses {n} {items}.", "Then {n} are taken away.")),
        Event("*", ("The number grows {n} times.", "Then there are {n} times as many.")),
        Event(
            "/", ("They are shared equally by {n} people.", "They are put into {n} equal groups. Look at one group.")
        ),
    ),
    asides=(),
    questions=("How many {items} are there?", "How many {items} now?", "What is the number of {items}?"),
    comparisons=(),
)

MARKET = Wording(
    starts=(
        "{who} carries {a} {items} to the market.",
        "On Monday {who} counts {a} {items} on the stall.",
        "{who} opens the stall with {a} {items}.",
    ),
    products=(
        "{who} unpacks {a} crates that hold {b} {items} each.",
        "{who} brings {b} {items} a day for {a} days.",
        "{who} fills {a} shelves, every shelf with {b} {items}.",
    ),
    events=(
        Event(
            "+",
            ("A farmer delivers {n} {items}.", "{n} come back from buyers.", "{who} picks up another {n} on the way."),
        ),
        Event("+", ("A dozen arrive by cart.", "{who} buys a dozen {items}."), operand=12),
        Event("-", ("{who} sells {n} before noon.", "{n} {items} are spoiled by rain.", "A thief runs off with {n}.")),
        Event("-", ("A score of {items} go to the church.", "{who} sends a score to the inn."), operand=20),
        Event("*", ("Trade is good and the stock doubles.", "A partner brings as many again."), operand=2),
        Event("*", ("By evening the stock has tripled.", "{who} orders twice that number on top."), operand=3),
        Event("/", ("Half of them are sold.", "{who} keeps only half."), operand=2),
        Event("/", ("{who} keeps a third of them.", "Only one in three is good enough."), operand=3),
        Event("/", ("{who} splits them evenly over {n} baskets and keeps one.", "{n} partners take equal parts.")),
    ),
    asides=(
        "{who} is {n} years old.",
        "The market has {n} stalls.",
        "It is {n} miles to town.",
        "The tent cost {n} silver.",
    ),
    questions=(
        "How many {items} does {who} end up with?",
        "How many {items} remain on the stall?",
        "What is left in the end?",
    ),
    comparisons=(
        ("+", "{other} has {n} more than that. How many do both have?"),
        ("-", "{other} has {n} fewer than that. What do they own together?"),
    ),
)

_APPLY: dict[Operator, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left // right,
}


def _operand(rng: random.Random, operator: Operator, value: int, fixed: int | None) -> int | None:
    """An operand that keeps the result whole and between 1 and LARGEST, or None if there is none."""
    if operator == "+":
        candidates = range(2, min(60, LARGEST - value) + 1)
    elif operator == "-":
        candidates = range(2, min(60, value - 1) + 1)
    elif operator == "*":
        candidates = range(2, min(LARGEST_FACTOR, LARGEST // value) + 1)
    else:
        candidates = [factor for factor in range(2, LARGEST_FACTOR + 1) if value % factor == 0]
    if fixed is not None:
        candidates = [fixed] if fixed in candidates else []
    return rng.choice(candidates) if candidates else None


class _Chain:
    """The arithmetic of one problem: the running number and a written line per step."""

    def __init__(self, rng: random.Random, *, swap: bool) -> None:
        self._rng = rng
        self._swap = swap
        self.lines: list[str] = []

    def step(self, left: int, operator: Operator, right: int) -> int:
        """Writes the line of one step (sums and products in random order with `swap`) and returns its result."""
        result = _APPLY[operator](left, right)
        if self._swap and operator in "+*" and self._rng.random() < 0.5:
            left, right = right, left
        self.lines.append(f"{left} {operator} {right} = {result}")
        return result

    def answer(self, result: int) -> str:
        """The whole answer."""
        return "\n".join([*self.lines, f"#### {result}"])


def _plain(rng: random.Random) -> Problem | None:
    """A problem with one or two steps of plain arithmetic, or None if the numbers do not fit."""
    chain = _Chain(rng, swap=False)
    value = rng.randint(2, LARGEST - 30)
    text = str(value)
    for _ in range(rng.choice((1, 1, 2))):
        operator = rng.choice(tuple(_APPLY))
        operand = _operand(rng, operator, value, None)
        if operand is None:
            return None
        text = f"{text} {operator} {operand}" if not chain.lines else f"({text}) {operator} {operand}"
        value = chain.step(value, operator, operand)
    return Problem(rng.choice(("What is {}?", "Compute {}.", "{} =")).format(text), chain.answer(value))


def _story(rng: random.Random, wording: Wording, *, events: int, swap: bool) -> Problem | None:
    """A problem with `events` events, or None if the numbers do not fit."""
    chain = _Chain(rng, swap=swap)
    who, other = rng.sample(NAMES, 2)
    names = {"who": who, "other": other, "items": rng.choice(ITEMS)}
    if rng.random() < 0.4:
        first, second = rng.randint(2, LARGEST_FACTOR), rng.randint(2, 12)
        sentences = [rng.choice(wording.products).format(**names, a=first, b=second)]
        value = chain.step(first, "*", second)
    else:
        value = rng.randint(3, 90)
        sentences = [rng.choice(wording.starts).format(**names, a=value)]
    for _ in range(events):
        event = rng.choice(wording.events)
        operand = _operand(rng, event.operator, value, event.operand)
        if operand is None:
            return None
        sentences.append(rng.choice(event.texts).format(**names, n=operand))
        value = chain.step(value, event.operator, operand)
    if wording.asides and rng.random() < 0.5:
        aside = rng.choice(wording.asides).format(**names, n=rng.randint(2, 60))
        sentences.insert(rng.randint(1, len(sentences)), aside)
    if wording.comparisons and rng.random() < 0.3:
        operator, text = rng.choice(wording.comparisons)
        operand = _operand(rng, operator, value, None)
        if operand is None:
            return None
        sentences.append(text.format(**names, n=operand))
        value = chain.step(value, "+", chain.step(value, operator, operand))
    else:
        sentences.append(rng.choice(wording.questions).format(**names))
    return Problem(" ".join(sentences), chain.answer(value))


def _draw(rng: random.Random, domain: Domain) -> Problem | None:
    if domain == "market":
        return _story(rng, MARKET, events=rng.choice((1, 2, 2)), swap=True)
    if rng.random() < 0.5:
        return _plain(rng)
    return _story(rng, BROAD, events=rng.choice((1, 1, 2)), swap=False)


def problems(domain: Domain, *, seed: int, taken: set[str]) -> Iterator[Problem]:
    """Yields endless problems of one domain with questions not in `taken`, and adds each question to it."""
    rng = random.Random(f"{domain} {seed}")
    while True:
        problem = _draw(rng, domain)
        if problem is None or problem.key in taken:
            continue
        taken.add(problem.key)
        yield problem


@dataclass(frozen=True, slots=True)
class Preference:
    """A question with its answer, and with an answer in which one step is calculated wrongly."""

    question: str
    chosen: str
    rejected: str


def preference(rng: random.Random, problem: Problem) -> Preference | None:
    """A problem with a wrong answer, or None if the numbers do not fit.

    One step gets a wrong result, and all later steps calculate with it, so that only that step is wrong. The final
    results differ.
    """
    steps = [line.split(" ") for line in problem.answer.splitlines()[:-1]]
    slip = rng.randrange(len(steps))
    changed: dict[int, int] = {}
    lines: list[str] = []
    for number, (left, operator, right, _, result) in enumerate(steps):
        values = [changed.get(int(left), int(left)), int(right)]
        if left != right:  # otherwise the right one is a number of the question
            values[1] = changed.get(values[1], values[1])
        if operator == "/" and values[0] % values[1]:
            return None
        found = _APPLY[cast("Operator", operator)](*values)
        found += rng.choice((-10, -2, -1, 1, 2, 10)) if number == slip else 0
        if found < 1:
            return None
        if number >= slip:
            changed[int(result)] = found
        lines.append(f"{values[0]} {operator} {values[1]} = {found}")
    if str(found) == steps[-1][-1]:
        return None
    return Preference(problem.question, problem.answer, "\n".join([*lines, f"#### {found}"]))


def preferences(market: Iterator[Problem], *, seed: int) -> Iterator[Preference]:
    """Yields endless preferences on problems."""
    rng = random.Random(f"preferences {seed}")
    for problem in market:
        found = preference(rng, problem)
        if found is not None:
            yield found


def quickstart_data() -> tuple[dict[str, list[Problem]], dict[str, list[Preference]], list[Problem]]:
    """The splits by name, the preferences by name, and the `broad` pre-training corpus; no question occurs twice.

    The split `retained` has further `broad` problems, the others have `market` problems.
    """
    taken: set[str] = set()
    market = problems("market", seed=SEED, taken=taken)
    splits = {name: list(itertools.islice(market, count)) for name, count in SPLITS.items()}
    broad = problems("broad", seed=SEED, taken=taken)
    corpus = list(itertools.islice(broad, CORPUS_PROBLEMS))
    splits["retained"] = list(itertools.islice(broad, RETAINED_PROBLEMS))
    compared = preferences(market, seed=SEED)
    pairs = {name: list(itertools.islice(compared, count)) for name, count in PREFERENCES.items()}
    return splits, pairs, corpus


def json_lines(part: Sequence[Problem | Preference]) -> str:
    """One JSON record per line: `question` and `answer`, or `prompt`, `chosen` and `rejected`."""
    return "".join(json.dumps(_record(item)) + "\n" for item in part)


def _record(item: Problem | Preference) -> dict[str, str]:
    if isinstance(item, Problem):
        return {"question": item.question, "answer": item.answer}
    return {"prompt": item.question, "chosen": item.chosen, "rejected": item.rejected}
