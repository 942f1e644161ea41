"""Spelling words out, and counting a letter in a word with the calculator: what a model that sees tokens finds hard.

nanochat's SimpleSpelling and SpellingBee. Two lists of words: invented ones, which are short, need no file and share
their syllables between train and test, so that a small model can learn to spell words it never saw; and 370 thousand
English ones. A word belongs to one split by its checksum. Counts 0 to 3 come equally often: guessing gets a quarter.
"""

import gzip
from functools import lru_cache
from typing import Any

from nanochat.common import base_dir, data_dir
from nanochat.config import UserError
from nanochat.world_names import CODAS, ONSETS, VOWELS, Dice
from tasks.common import Split, Task, check_split, exchange, split_of, text, tool_call
from tasks.gsm8k import same_answer

WORDS_FILE = "tok/words_alpha.txt.gz"  # dwyl/english-words, as nanochat
N_INVENTED = 8000
MAX_COUNT = 3
TEST_SIZE = 512
COUNT_FORMS = (
    'How many times does the letter "{letter}" occur in this word?\n"{word}"',
    'Count the letter "{letter}" in:\n"{word}"',
    'How many "{letter}" are there in the following word?\n"{word}"',
)
SPELL_FORMS = ("Spell this word:\n{word}", "Write the letters of the word:\n{word}", "How do you spell it?\n{word}")


class SimpleSpelling(Task):
    """'Spell this word: bado' -> 'b,a,d,o'."""

    kind = "generative"

    def __init__(
        self, split: str, words: str = "invented", train_size: int = 8192, name: str = "Spelling", **span: Any
    ):
        super().__init__(**span)
        check_split(name, split)
        self.name, self.split, self.n = name, split, train_size if split == "train" else TEST_SIZE
        self.words = words_of(words, split)

    def size(self) -> int:
        return self.n

    def example(self, i: int) -> dict[str, Any]:
        dice = Dice("Spelling", self.split, i)
        word = dice.pick(self.words)
        return exchange(dice.pick(SPELL_FORMS).format(word=word), ",".join(word))

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]


class SpellingBee(SimpleSpelling):
    """'Count the letter "a" in: "badal"' -> the letters, then '"badal".count("a")' = 2, then '#### 2'."""

    baseline = 1 / (MAX_COUNT + 1)

    def __init__(
        self, split: str, words: str = "invented", train_size: int = 8192, name: str = "SpellingBee", **span: Any
    ):
        super().__init__(split, words, train_size, name, **span)

    def example(self, i: int) -> dict[str, Any]:
        dice = Dice("SpellingBee", self.split, i)
        word, letter = self._draw(dice)
        count = str(word.count(letter))
        answer = [*tool_call(f'"{word}".count("{letter}")', count), text(f"#### {count}")]
        return exchange(dice.pick(COUNT_FORMS).format(word=word, letter=letter), answer)

    def _draw(self, dice: Dice) -> tuple[str, str]:
        """A word and a letter that it holds 0 .. MAX_COUNT times, each count equally likely."""
        count = dice.below(MAX_COUNT + 1)
        while True:
            word = dice.pick(self.words)
            letters = [c for c in "abcdefghijklmnopqrstuvwxyz" if word.count(c) == count]
            if letters:
                return word, dice.pick(letters)

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return same_answer(conversation, completion)


@lru_cache(maxsize=6)
def words_of(words: str, split: Split) -> tuple[str, ...]:
    """The words of one split. words: "invented" or "english"."""
    return tuple(w for w in (_invented() if words == "invented" else _english()) if split_of(w) == split)


def _invented() -> list[str]:
    """Two or three syllables of the invented world's language (nanochat/world_names.py), 4 to 9 letters, no two alike.

    Every third word repeats its first vowel throughout, so that some letters occur three times.
    """
    dice, words = Dice("invented words"), {}
    while len(words) < N_INVENTED:
        vowels = dice.pick(VOWELS) if len(words) % 3 == 0 else VOWELS
        syllables = [dice.pick(ONSETS) + dice.pick(vowels) for _ in range(2 + dice.below(2))]
        words["".join(syllables) + dice.pick(CODAS)] = True
    return list(words)


def _english() -> list[str]:
    folder = data_dir()
    places = [base_dir() / "task_data" / "words_alpha.txt.gz"]
    if folder:
        places.insert(0, folder / WORDS_FILE)
    for path in places:
        if path.is_file():
            with gzip.open(path, "rt", encoding="ascii") as f:
                return f.read().split()
    raise UserError(
        f"the list of English words is not on this machine: gzip words_alpha.txt of github.com/dwyl/english-words "
        f"to {places[0]}"
    )
