"""Random printable text: words in all cases, numbers with signs and units, strings of any character."""

from functools import lru_cache

import numpy as np


CHARACTERS = "".join(map(chr, range(33, 127)))
DIGITS = "0123456789"
COARSE = (
    "fuck",
    "shit",
    "cunt",
    "nigg",
    "bitch",
    "porn",
    "rape",
    "slut",
    "whore",
    "dick",
    "cock",
    "pussy",
    "fag",
    "tits",
)


@lru_cache
def load_words() -> tuple[str, ...]:
    """
    The 40,000 most frequent English words that are ASCII, most frequent first.

    Raises:
        ImportError: if `wordfreq` is not installed; it belongs to the extra "lab".
    """
    try:
        from wordfreq import top_n_list
    except ImportError as error:
        raise ImportError('wordfreq is missing: pip install -c constraints.txt -e ".[lab]"') from error
    words = (word for word in top_n_list("en", 40_000) if word.isascii() and not word.isdigit())
    return tuple(word for word in words if not any(part in word for part in COARSE))


def pick(rng: np.random.Generator, values):
    """One of the values, all alike."""
    return values[rng.integers(len(values))]


def random_word(rng: np.random.Generator) -> str:
    """A real word, at times capitalised or in capitals; frequent ones come more often."""
    words = load_words()
    word = words[int(len(words) ** rng.uniform(0.35, 1)) - 1]
    case = rng.random()
    return word if case < 0.45 else word.capitalize() if case < 0.72 else word.upper()


def random_digits(rng: np.random.Generator, least: int, most: int) -> str:
    return "".join(pick(rng, DIGITS) for _ in range(rng.integers(least, most + 1)))


def random_price(rng: np.random.Generator) -> str:
    """An amount of money, mostly with decimals."""
    amount = int(10 ** rng.uniform(0, 4))
    whole = f"{amount:,}" if rng.random() < 0.3 else str(amount)
    mark = "," if rng.random() < 0.2 and "," not in whole else "."
    amount = whole if rng.random() < 0.15 else whole + mark + random_digits(rng, 2, 2)
    sign = pick(rng, ("", "", "", "$", "$", "-", "-$", "US$", "+"))
    return sign + amount + pick(rng, ("", "", "", "", "", " USD", " EUR", " A", "-", "*"))


def random_number(rng: np.random.Generator) -> str:
    """A number as print has it: plain, with decimals, a price, a share, a date, a time, a code."""
    form = rng.integers(9)
    if form == 0:
        return random_price(rng)
    digits = random_digits(rng, 1, 5)
    forms = (
        digits,
        f"{digits}.{random_digits(rng, 1, 3)}",
        f"{random_digits(rng, 1, 2)}{pick(rng, ('%', '.5%', 'x', 'kg', 'g', 'ml', ' x', 'cm', 'h'))}",
        pick(rng, "./-").join((random_digits(rng, 2, 2), random_digits(rng, 2, 2), random_digits(rng, 2, 4))),
        f"{random_digits(rng, 1, 2)}:{random_digits(rng, 2, 2)}",
        f"{pick(rng, '#@+=<>~')}{digits}",
        f"{random_digits(rng, 1, 3)}{pick(rng, '+-*/=<>^|')}{random_digits(rng, 1, 3)}",
        f"{pick(rng, CHARACTERS[32:58])}{pick(rng, ('', '-', '/'))}{digits}",
    )
    return forms[form - 1]


def random_string(rng: np.random.Generator, most: int = 8) -> str:
    """Any characters, all alike."""
    return "".join(pick(rng, CHARACTERS) for _ in range(rng.integers(1, most + 1)))


def random_token(rng: np.random.Generator) -> str:
    """What stands between two spaces; points and commas come more often than in prose."""
    form = rng.random()
    if form < 0.58:
        token = random_word(rng)
        if rng.random() < 0.12:
            token = pick(
                rng, ("({})", '"{}"', "'{}'", "[{}]", "{}-" + random_word(rng), "{}/" + random_word(rng))
            ).format(token)
    elif form < 0.78:
        token = random_number(rng)
    elif form < 0.97:
        token = random_string(rng)
    else:
        token = pick(rng, "._-=*:") * int(rng.integers(2, 7))
    return token + pick(rng, ".,.,.,:;!?") if rng.random() < 0.25 else token


def random_text(rng: np.random.Generator, length: int) -> str:
    """Tokens and single spaces, at most `length` characters and at least one."""
    text = random_token(rng)
    while len(text) < length:
        text += " " + random_token(rng)
    return text[: max(length, 1)].strip() or pick(rng, CHARACTERS)
