"""What every test shares: no network, hypothesis profiles, one thread, a certificate at the end."""

import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test needs a network

import hypothesis
import pytest
import torch

from tests import certificate

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=50, report_multiple_bugs=False
)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("default"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")
torch.set_num_threads(1)  # the tensors are small: two threads would only wait for each other


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Note what became of a claim's test: after its setup, its call and its teardown."""
    report = yield
    docstring = getattr(getattr(item, "function", None), "__doc__", None)
    certificate.note(item.nodeid, docstring, report.outcome)
    return report


def pytest_terminal_summary(terminalreporter):
    """Print the certificate of the claims that ran."""
    encoding = sys.__stdout__.encoding or "ascii"
    lines = certificate.lines(shutil.get_terminal_size().columns, encoding)
    if lines:
        terminalreporter.section("certificate", "-")
    for line in lines:
        terminalreporter.write_line(line)
