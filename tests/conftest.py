"""Settings that every test shares: no network, hypothesis profiles, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test needs a network

import hypothesis
import torch

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=50, report_multiple_bugs=False
)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("default"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")
torch.set_num_threads(1)  # the tensors are small: two threads would only wait for each other
