"""A pytest plugin for exercise.py: what is wrong, in a line for each test, in verdict.json."""

import doctest
import json
import re
import traceback
from pathlib import Path

import hypothesis

VERDICTS: dict[str, str] = {}  # the test's name: "" or what is wrong


def pytest_sessionstart() -> None:
    """Draw the same cases each time, and reduce what fails to the smallest one."""
    phases = hypothesis.Phase.generate, hypothesis.Phase.shrink
    parent = hypothesis.settings.get_profile("ci")
    hypothesis.settings.register_profile("verdict", parent=parent, phases=phases)
    hypothesis.settings.load_profile("verdict")


def pytest_runtest_makereport(item, call) -> None:
    """Keep the first thing that goes wrong in a test."""
    if not VERDICTS.get(item.name):
        VERDICTS[item.name] = complaint(call.excinfo.value) if call.excinfo else ""


def pytest_exception_interact(node, call) -> None:
    """A module that cannot be imported has no tests."""
    VERDICTS.setdefault(node.name, complaint(call.excinfo.value))


def pytest_sessionfinish() -> None:
    """Write what was found."""
    Path("verdict.json").write_text(json.dumps(VERDICTS), encoding="utf-8")


def complaint(error: BaseException) -> str:
    """What an error says: the case, if one was drawn, then a wrong value, or the line at fault."""
    if isinstance(error, doctest.DocTestFailure):
        found, wanted = short(error.got), short(error.example.want)
        unsigned = re.sub(r"-(0\.0*)(?!\d)", r" \1", found)  # -0. is 0.
        if unsigned.replace(" ", "") == wanted.replace(" ", ""):
            return ""
        return f"{short(error.example.source)} gives {found}, want {wanted}"
    if isinstance(error, doctest.UnexpectedException):
        return complaint(error.exc_info[1])
    if isinstance(error, NotImplementedError):
        return "not written yet"
    exercise = Path.cwd()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).parent == exercise]
    message = str(error).strip().partition("\n")[0]
    if not isinstance(error, AssertionError):
        message = f"{type(error).__name__}: {message}"
    if lines:
        message = f"line {lines[-1]}: {message}"
    notes = "\n".join(getattr(error, "__notes__", []))
    case = re.search(r"test_\w+\(\n(.*?)\n\)", notes, flags=re.S)  # hypothesis's smallest
    return f"{short(re.sub('#.*', '', case[1])).rstrip(',')}: {message}" if case else message


def short(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())
