"""The claims of a method file: its docstrings' paragraphs "Claim N. sentence"."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
METHODS = ("hra", "resora", "eigenlorax")


def paragraphs(text: str) -> list[str]:
    """The paragraphs of the docstrings of a module's functions, classes and methods.

    One ends at an empty line, before the next claim, or with the docstring.
    """
    defined = (ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, defined)]
    docstrings = [ast.get_docstring(node) or "" for node in nodes]
    parts = [part for doc in docstrings for part in re.split(r"\n\s*\n|\n(?=Claim \d+\. )", doc)]
    return [" ".join(part.split()) for part in parts]


def claims_in(text: str, letter: str) -> dict[str, str]:
    """{"H1": sentence, …} of a module's text, by number. ValueError unless each is there once."""
    matches = [re.fullmatch(r"Claim (\d+)\. (.+)", part) for part in paragraphs(text)]
    found = sorted((int(match[1]), match[2]) for match in matches if match)
    numbers = [number for number, _ in found]
    if numbers != list(range(1, len(found) + 1)) or not found:
        raise ValueError(f"found the claims {numbers}; want each of 1, 2, … once")
    return {f"{letter}{number}": sentence for number, sentence in found}


def claims(method: str) -> dict[str, str]:
    """{"H1": sentence, …} of hra.py, resora.py or eigenlorax.py."""
    return claims_in((ROOT / f"{method}.py").read_text(encoding="utf-8"), method[0].upper())
