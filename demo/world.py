"""The small world that the demo's base model reads about: animals, things, letters, numbers.

Everything is drawn from one seed. The draws use only `random.Random.random`, the one method
whose sequence Python promises to keep, so the same seed gives the same text on any version.

A **remark** is one to three sentences on one subject; a **document** is a line of a few remarks or
one story; a **page** is a few documents, one a line.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
WEATHER = ("the sun shines", "it rains", "it snows", "the wind blows", "there is fog")
PLACES = ("box", "barn", "boat", "cave", "hut", "mill", "tower", "shed", "garden", "well")

# animal: colour, home, food, sound
ANIMALS: dict[str, tuple[str, str, str, str]] = {
    "fox": ("red", "den", "eggs", "yips"),
    "owl": ("brown", "oak", "mice", "hoots"),
    "duck": ("white", "pond", "bread", "quacks"),
    "frog": ("green", "marsh", "flies", "croaks"),
    "cow": ("black", "field", "grass", "moos"),
    "bear": ("brown", "cave", "honey", "growls"),
    "mouse": ("grey", "wall", "cheese", "squeaks"),
    "pig": ("pink", "sty", "corn", "grunts"),
    "crow": ("black", "elm", "seeds", "caws"),
    "goat": ("white", "hill", "leaves", "bleats"),
    "lion": ("yellow", "plain", "meat", "roars"),
    "seal": ("grey", "ice", "fish", "barks"),
    "snake": ("green", "sand", "frogs", "hisses"),
    "bee": ("yellow", "hive", "nectar", "buzzes"),
    "hen": ("red", "yard", "worms", "clucks"),
    "horse": ("black", "stable", "hay", "neighs"),
    "wolf": ("grey", "forest", "rabbits", "howls"),
    "cat": ("orange", "house", "cream", "purrs"),
    "deer": ("brown", "glade", "bark", "bells"),
    "swan": ("white", "lake", "reeds", "sings"),
}

# thing: colour, what it is good for
THINGS: dict[str, tuple[str, str]] = {
    "lamp": ("yellow", "seeing at night"),
    "rope": ("brown", "tying knots"),
    "cup": ("blue", "drinking tea"),
    "drum": ("red", "making noise"),
    "kite": ("green", "playing outside"),
    "spade": ("grey", "digging holes"),
    "broom": ("yellow", "sweeping floors"),
    "coat": ("blue", "keeping warm"),
    "key": ("grey", "opening doors"),
    "book": ("red", "reading stories"),
    "bell": ("orange", "calling friends"),
    "knife": ("black", "cutting bread"),
}


class Dice:
    """Seeded draws that are the same on every Python version."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return int(self._random.random() * bound)

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different members of `items`, in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]


def animal_remark(dice: Dice) -> str:
    """Two facts about one animal, as statements or as a question with its answer."""
    name = dice.pick(list(ANIMALS))
    colour, home, food, sound = ANIMALS[name]
    facts = (
        f"The {name} is {colour}.",
        f"The {name} lives in the {home}.",
        f"The {name} eats {food}.",
        f"When it wakes up, the {name} {sound}.",
        f"What colour is the {name}? It is {colour}.",
        f"Where does the {name} live? It lives in the {home}.",
        f"What does the {name} eat? It eats {food}.",
    )
    return " ".join(dice.sample(facts, 2))


def thing_remark(dice: Dice) -> str:
    """What a thing looks like and what it is good for."""
    name = dice.pick(list(THINGS))
    colour, use = THINGS[name]
    facts = (f"The {name} is {colour}.", f"The {name} is good for {use}.")
    return " ".join(dice.sample(facts, 1 + dice.below(2)))


def day_remark(dice: Dice) -> str:
    """A day, its weather, and the day that follows."""
    day = dice.below(7)
    after = DAYS[(day + 1) % 7]
    return f"On {DAYS[day]} {dice.pick(WEATHER)}. After {DAYS[day]} comes {after}."


def count_remark(dice: Dice) -> str:
    """Counting up, counting down, comparing, and sums of two digits."""
    start, length = dice.below(990), 3 + dice.below(4)
    a, b = dice.below(10), dice.below(10)
    low, high = sorted(dice.sample(range(100), 2))
    return dice.pick(
        (
            f"Count up: {', '.join(str(start + k) for k in range(length))}.",
            f"Count down: {', '.join(str(start + length - k) for k in range(length))}.",
            f"{low} is less than {high}.",
            f"{high} is more than {low}.",
            f"{a}+{b}={a + b}.",
        )
    )


def letter_remark(dice: Dice) -> str:
    """Letters in the order of the alphabet, spelling, and lists said twice."""
    chosen = sorted(dice.sample(LETTERS, 3 + dice.below(4)))
    place = dice.below(25)
    word = dice.pick(list(ANIMALS) + list(THINGS))
    listed = " ".join(dice.sample(LETTERS, 3 + dice.below(4)))
    return dice.pick(
        (
            f"Letters in order: {' '.join(chosen)}.",
            f"After {LETTERS[place]} comes {LETTERS[place + 1]}.",
            f"We spell {word} as {' '.join(word)}.",
            f"Say {listed} again: {listed}.",
        )
    )


def story(dice: Dice) -> tuple[str, str, list[str]]:
    """Animals carry things to places; the last sentence asks where one thing ended up.

    Returns (the story up to the answer, the answer, the four places one could think of).
    """
    actors = dice.sample(list(ANIMALS), 2)
    things = dice.sample(list(THINGS), 2)
    places = dice.sample(PLACES, 4)
    where: dict[str, str] = {}
    lines = [f"On {dice.pick(DAYS)} {dice.pick(WEATHER)}."]
    moves = [things[0], things[1]] + [dice.pick(things)] * dice.below(2)
    for thing in dice.sample(moves, len(moves)):
        options = [place for place in places if place not in where.values()]
        where[thing] = dice.pick(options)
        lines.append(f"The {dice.pick(actors)} puts the {thing} in the {where[thing]}.")
    asked = dice.pick(things)
    lines.append(f"Where is the {asked}? The {asked} is in the")
    return " ".join(lines), where[asked], places


REMARKS: tuple[Callable[[Dice], str], ...] = (
    animal_remark,
    animal_remark,
    thing_remark,
    day_remark,
    count_remark,
    letter_remark,
)


def document(dice: Dice) -> str:
    """One line of text: a story (three in ten) or three remarks on different subjects."""
    if dice.below(10) < 3:
        told, answer, _ = story(dice)
        return f"{told} {answer}."
    return " ".join(dice.pick(REMARKS)(dice) for _ in range(3))


def documents(seed: int, split: str, count: int, without: frozenset[str]) -> list[str]:
    """`count` different documents of `split`, none of which is in `without`."""
    dice = Dice(f"world/{split}/{seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        line = document(dice)
        if line not in without:
            found[line] = None
    return list(found)
