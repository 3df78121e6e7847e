"""figures/diffusion.py: the flow, the styles, the judge, and that all components lose nothing."""

import sys

import pytest
import torch
from torch import nn

import common
import eigenlorax
from figures import diffusion


class Guess(nn.Module):
    """Guesses that behind x at time t is a picture full of ink, right if w = 1.

    Between noise z and such an image, 1, x_t = (1 − t)·z + t: the rest of the way is 1 − x_t.
    """

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x, t, digit):
        return x + self.w * (1 - x)


def test_a_model_learns_what_is_behind_the_noise_and_draws_it():
    ink, digit = torch.ones(50, 1, 16, 16), torch.zeros(50, dtype=torch.int64)
    model = Guess(0.0)
    diffusion.train(model, (ink, digit), {"steps": 100, "rate": 0.1, "batch": 8}, "test")
    assert model.w.item() == pytest.approx(1, abs=0.01)
    assert torch.equal(diffusion.drawing(Guess(1.0), digit), ink)


def test_styles_differ_and_are_ink():
    ink, _ = diffusion.digits()
    found = diffusion.styles(ink[:100])
    assert len(found) == 20
    pages = torch.stack([ink[:100], *found.values()])
    assert pages.isfinite().all() and pages.min() >= 0 and pages.max() <= 1
    apart = torch.cdist(pages.flatten(1), pages.flatten(1)) + 1e9 * torch.eye(21)
    assert apart.min() > 10  # of 25,600 pixels


def test_the_judge_knows_real_digits_and_their_style():
    ink, digit = diffusion.digits()
    known, other = slice(0, 1000), slice(1000, 1200)
    judge = diffusion.Judge({"plain": ink[known], "inverted": 1 - ink[known]}, digit[known])
    found = judge(1 - ink[other], "inverted", digit[other])
    assert found["style"] == 1 and found["digit"] == found["both"] > 0.9
    assert judge(1 - ink[other], "plain", digit[other])["style"] == 0


def test_pictures_are_kept_as_text():
    ink, _ = diffusion.digits()
    (text,) = diffusion.as_text(ink[:1])
    assert (diffusion.as_picture(text) - ink[0, 0]).abs().max() <= 0.5 / 15 + 1e-6


def test_all_components_draw_what_each_lora_draws():
    """Of untrained adapters: every style's own, and none of its neighbour's."""
    torch.manual_seed(0)
    base, asked = diffusion.Painter(), torch.arange(3)
    layers = eigenlorax.find_layers(base, diffusion.TARGETS, nn.Linear)
    adapters, wanted = {}, {}
    for style in ("one", "another"):
        pairs = {name: (torch.randn(m.out_features, 2), torch.randn(2, m.in_features) / 20)
                 for name, m in layers.items()}  # fmt: skip
        model = diffusion.copy.deepcopy(base)
        for name, (B, A) in pairs.items():
            model.get_submodule(name).weight.data += B @ A
        adapters[style], wanted[style] = pairs, diffusion.drawing(model, asked)
    found = diffusion.recycled(base, adapters, None, asked)
    for style, drawn in wanted.items():
        assert (found["drawn"][style] - drawn).abs().max() < 1e-3
    assert (wanted["one"] - wanted["another"]).abs().max() > 0.1
    assert max(found["error"].values()) < 1e-5


@pytest.mark.slow
def test_a_few_steps_of_everything_end_in_a_figure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "diffusion.json"
    monkeypatch.setattr(sys, "argv", ["diffusion", "--measure", "--quick", "--out", str(out)])
    diffusion.main()
    first = common.read_json(out)
    assert out.with_suffix(".png").exists() and len(first["pictures"]["LoRA"]) == 20
    diffusion.main()  # from what is kept
    assert common.read_json(out) == first
