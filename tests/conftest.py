"""Settings that every test shares: hypothesis profiles and two threads."""

import os

import hypothesis
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")
torch.set_num_threads(min(2, os.cpu_count() or 1))
