"""How people vary a question without changing it: politeness, slips of the keyboard, carelessness."""

from __future__ import annotations

import re
from random import Random

_OPENINGS = (
    "hi, ", "hello, ", "hey, ", "hi! ", "Hello! ", "please tell me: ", "please, ", "quick question: ", "question: ",
    "sorry, ", "excuse me, ", "ok, ", "okay so ", "so ", "and ", "um, ", "well, ", "I was wondering, ", "I wonder: ",
    "can you tell me, ", "could you explain: ", "tell me, ", "one more thing: ", "I am new here. ", "newbie here, ",
    "Good morning. ", "help! ", "maybe a silly question, ", "just curious, ", "by the way, ", "now, ", "thanks. ",
    "great. ", "I read the docs but ", "hmm, ", "I have a question. ", "another question: ",
)  # fmt: skip
_CLOSINGS = (
    " please", ", please", " thanks", ", thanks!", " thank you", " pls", " plz", " thx", ", do you know?", " ?",
    " I am new to this", ", I am a beginner", " Thanks in advance", " any idea?", " anyone?", "??", "!", "...", " :)",
    " asap", ", I'm stuck", " - help",
)  # fmt: skip
_SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("Petals Chat", "petals chat", "this chat", "this app", "this program", "this software", "the chat", "petals-chat",
     "the app", "Petalschat", "this tool", "this project", "this thing", "your software"),
    ("how do I", "how can I", "how do you", "how could I", "how would I", "what is the way to", "how to",
     "how should I", "is there a way to", "tell me how to", "show me how to", "what do I do to", "how might one",
     "I want to know how to", "I'd like to", "I need to", "I want to"),
    ("what is", "what's", "whats", "what exactly is", "explain", "tell me what is", "can you explain"),
    ("what does", "what would", "tell me what does"),
    ("can I", "could I", "may I", "am I able to", "is it possible to", "is it ok to", "can you", "can one", "can we"),
    ("do I need", "do I require", "must I have", "do I have to have", "is it necessary to have", "do we need"),
    ("where is", "where's", "where do I find", "where can I find", "where would I look for"),
    ("mean", "tell me", "stand for"),
    ("computer", "machine", "pc", "laptop", "box", "server", "desktop"),
    ("start", "launch", "run", "boot up", "fire up"),
    ("configure", "set up", "set"),
    ("change", "modify", "alter", "adjust", "switch"),
    ("error", "problem", "message", "failure"),
    ("answer", "reply", "response"),
    ("answers", "replies", "responses"),
    ("folder", "directory"),
    ("my", "our", "the"),
    ("show", "display", "print"),
    ("use", "work with", "make use of"),
    ("need", "require"),
    ("fast", "quick"),
    ("slow", "sluggish"),
    ("big", "large", "huge"),
    ("doesn't", "does not", "doesnt", "won't"),
    ("don't", "do not", "dont"),
    ("can't", "cannot", "cant", "can not", "am unable to"),
    ("I'm", "I am", "im"),
    ("it's", "it is", "its"),
)  # fmt: skip
_SMALL_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "do",
        "does",
        "is",
        "are",
        "i",
        "it",
        "for",
        "on",
        "in",
        "my",
        "me",
        "please",
        "this",
        "that",
        "can",
        "you",
    ]
)
_NEIGHBOURS = {
    "a": "sq", "b": "vn", "c": "xv", "d": "sf", "e": "wr", "f": "dg", "g": "fh", "h": "gj", "i": "uo", "j": "hk",
    "k": "jl", "l": "k", "m": "n", "n": "bm", "o": "ip", "p": "o", "q": "wa", "r": "et", "s": "ad", "t": "ry",
    "u": "yi", "v": "cb", "w": "qe", "x": "zc", "y": "tu", "z": "x",
}  # fmt: skip


def _replacements() -> dict[str, tuple[str, ...]]:
    return {text.lower(): group for group in _SYNONYMS for text in group}


_REPLACEMENTS = _replacements()
_LONGEST_FIRST = sorted(_REPLACEMENTS, key=len, reverse=True)
_REPLACEABLE = re.compile(
    r"(?<![\w'`/.-])(" + "|".join(map(re.escape, _LONGEST_FIRST)) + r")(?![\w'`/-])", re.IGNORECASE
)


def reword(question: str, random: Random) -> str:
    """The question as somebody else might have typed it. Half of the questions stay nearly as they are."""
    if random.random() < 0.35:
        question = _replace_synonyms(question, random)
    if random.random() < 0.12:
        question = _drop_small_words(question, random)
    if random.random() < 0.12:
        question = random.choice(_OPENINGS) + _uncapitalised(question)
    if random.random() < 0.08:
        question = question.rstrip("?.! ") + random.choice(_CLOSINGS)
    if random.random() < 0.3:
        question = question.rstrip("?.!")
    case = random.random()
    if case < 0.35:
        question = question.lower()
    elif case < 0.36:
        question = question.upper()
    elif case < 0.6:
        question = question[:1].upper() + question[1:]
    if random.random() < 0.2:
        for _ in range(random.choice((1, 1, 2))):
            question = _slip(question, random)
    return question.strip() or "?"


def mingle(question: str, other: str, random: Random) -> str:
    """Words of two wordings of a question, in any order, some of them left out."""
    words = question.split() if random.random() < 0.4 else [*question.split(), *other.split()]
    random.shuffle(words)
    share = random.choice((0.5, 0.7, 0.85, 1.0))
    return " ".join(words[: max(3, round(share * len(words)))])


def _replace_synonyms(question: str, random: Random) -> str:
    def replaced(match: re.Match[str]) -> str:
        if random.random() < 0.5:
            return match[0]
        chosen = random.choice(_REPLACEMENTS[match[0].lower()])
        return chosen[:1].upper() + chosen[1:] if match.start() == 0 else chosen

    return _REPLACEABLE.sub(replaced, question)


def _drop_small_words(question: str, random: Random) -> str:
    words = question.split()
    kept = [word for word in words if word.lower() not in _SMALL_WORDS or random.random() < 0.4]
    return " ".join(kept) if len(kept) >= 2 else question


def _uncapitalised(question: str) -> str:
    first = question.split(" ", 1)[0]
    return (
        question if first.startswith("I") or not first[1:].islower() else question[:1].lower() + question[1:]
    )


def _slip(question: str, random: Random) -> str:
    """One slip of the keyboard, inside a word of at least four letters."""
    places = [match.span() for match in re.finditer(r"[A-Za-z]{4,}", question)]
    if not places:
        return question
    start, end = random.choice(places)
    at = random.randrange(start + 1, end - 1)
    before, letter, following, after = question[:at], question[at], question[at + 1], question[at + 2 :]
    kind = random.randrange(4)
    if kind == 0:
        return before + following + letter + after
    if kind == 1:
        return before + following + after
    if kind == 2:
        return before + letter + letter + following + after
    return before + random.choice(_NEIGHBOURS.get(letter.lower(), letter)) + following + after
