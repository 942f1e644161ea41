"""Tasks that need no files: sums with the calculator, and who the assistant is. For the world's see world_questions.

Everything is generated from (split, index). A problem's checksum decides its split, so train and test share none. Sized
for a model of a few million parameters and a few hundred steps: the numbers of a sum stand in the question as they
stand in the call, so what is to be learned is where to copy from.
"""

from typing import Any

from nanochat.execution import calculate
from nanochat.world_names import Dice
from nanochat.world_text import VALUES
from tasks.common import Task, check_split, exchange, split_of, text, tool_call
from tasks.gsm8k import same_answer

TRAIN_SIZE, TEST_SIZE = 8192, 512
NAME = "nanochat"

SUMS = {
    "+": (
        "What is {a} + {b}?",
        "Add {a} and {b}.",
        "{who} has {a} {things} and buys {b} more. How many {things} does {who} have now?",
        "There are {a} {things} in one box and {b} in another. How many {things} are there in all?",
    ),
    "-": (
        "What is {a} - {b}?",
        "Take {b} away from {a}.",
        "{b} of {a} {things} are sold. How many {things} are left?",
        "{who} has {a} {things} and sells {b} of them. How many {things} are left?",
        "A shop had {a} {things}. Now {b} of them are gone. How many {things} remain?",
    ),
    "*": ("What is {a} * {b}?", "{who} has {a} boxes of {b} {things} each. How many {things} does {who} have?"),
    "++": (
        "What is {a} + {b} + {c}?",
        "{who} has {a} {things}, finds {b} and buys {c} more. How many {things} does {who} have now?",
    ),
    "+-": (
        "What is {a} + {b} - {c}?",
        "{who} has {a} {things}, buys {b} more and then sells {c}. How many {things} are left?",
        "From {a} {things} and {b} more, {c} are taken away. How many {things} remain?",
    ),
    "*+": (
        "What is {a} * {b} + {c}?",
        "There are {a} boxes of {b} {things} each, and {c} more {things} on the floor. How many are there in all?",
        "To {c} {things} come {a} boxes of {b} each. How many {things} are there now?",
    ),
    "*-": (
        "What is {a} * {b} - {c}?",
        "Of {a} boxes of {b} {things} each, {c} {things} are broken. How many {things} are whole?",
    ),
}
OPERATORS = ("+", "+", "-", "-", "*", "++", "+-", "*+", "*-")
# sentences before a told problem whose number has nothing to do with it
NOISE = ("{who} is {n} years old. ", "It is {n} kilometres to the market. ", "The house has number {n}. ")
THINGS = [word for word in VALUES["goods"] if word not in ("paper", "glass")]
WHO = ("Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gus", "Hana")


class Arithmetic(Task):
    """Sums of two or three numbers below 100 (1000 in three of ten) and products below 20 * 20, bare or told.

    A told one may hold a number too many. Answers as GSM8K's: a call of the calculator, then '#### 82'.
    """

    name = "Arithmetic"
    kind = "generative"

    def __init__(self, split: str, **span: Any):
        super().__init__(**span)
        check_split(self.name, split)
        self.split, self.n = split, TRAIN_SIZE if split == "train" else TEST_SIZE

    def size(self) -> int:
        return self.n

    def example(self, i: int) -> dict[str, Any]:
        dice = Dice(self.name, self.split, i)
        operators, numbers, expression = self._problem(dice)
        form = dice.pick(SUMS[operators])
        if "{who}" in form and dice.chance(0.3):
            form = dice.pick(NOISE) + form
        values = dict(zip("abc", numbers, strict=False))
        question = form.format(**values, n=2 + dice.below(98), who=dice.pick(WHO), things=dice.pick(THINGS))
        result = calculate(expression)
        assert result is not None, expression
        return exchange(question, [*tool_call(expression, result), text(f"#### {result}")])

    def _problem(self, dice: Dice) -> tuple[str, list[int], str]:
        """Operators, numbers and expression of a problem of this split with no negative result."""
        while True:
            operators = dice.pick(OPERATORS)
            most = 1000 if dice.chance(0.3) else 100
            numbers = [2 + dice.below(most - 2) for _ in range(len(operators) + 1)]
            if operators[0] == "*":
                numbers[:2] = [2 + dice.below(18), 2 + dice.below(18)]
            expression = "".join(f"{n}{op}" for n, op in zip(numbers, [*operators, ""], strict=True))
            if split_of(expression) == self.split and int(calculate(expression) or -1) >= 0:
                return operators, numbers, expression

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return same_answer(conversation, completion)


GREETINGS = ("", "Hello, ", "Hi, ", "Good morning, ", "Hey, ", "Excuse me: ", "Please tell me: ", "I wonder: ")
IDENTITY: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("who are you?", "what are you?", "what is your name?", "what should I call you?", "introduce yourself."),
        f"I am {NAME}, a small language model.",
    ),
    (
        ("are you ChatGPT?", "are you a human?", "are you a person?", "am I talking to a machine?"),
        f"No human and no ChatGPT: I am {NAME}, a small language model.",
    ),
    (
        ("who made you?", "who trained you?", "where do you come from?", "who built you?"),
        f"I am {NAME}. Whoever runs my code has trained me, from nothing, on their own machine.",
    ),
    (
        ("what can you do?", "can you help me?", "what are you good at?", "what do you know?"),
        "I can add numbers with a calculator, spell words and answer questions about a small invented world.",
    ),
    (
        ("can I trust you?", "are you always right?", "do you make mistakes?", "how clever are you?"),
        "I am a very small model and often wrong. Please check what I say.",
    ),
)


class Identity(Task):
    """Who the assistant is. To train on: a greeting and a question, its answer, sometimes thanks at the end."""

    name = "Identity"
    kind = "conversation"

    def __init__(self, split: str, **span: Any):
        super().__init__(**span)
        check_split(self.name, split)
        self.split, self.n = split, (TRAIN_SIZE if split == "train" else TEST_SIZE) // 8

    def size(self) -> int:
        return self.n

    def example(self, i: int) -> dict[str, Any]:
        dice = Dice(self.name, self.split, i)
        while True:
            questions, answer = dice.pick(IDENTITY)
            greeting, question = dice.pick(GREETINGS), dice.pick(questions)
            asked = greeting + question
            if split_of(asked) == self.split:
                break
        conversation = exchange(asked[0].upper() + asked[1:], answer)
        if dice.chance(0.2):
            conversation["messages"] += exchange("Thank you!", "You are welcome.")["messages"]
        return conversation
