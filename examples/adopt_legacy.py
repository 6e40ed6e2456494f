"""A model that PyTorch's own tools parametrized, legacy hooks included: one call takes it over."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fxparam as fxp


def vocoder() -> nn.Module:
    """A small stack as older code writes it: three kinds of computed weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch deprecates the hook, and released models still have it
        first = nn.utils.weight_norm(nn.Conv1d(8, 32, 7, padding=3))
    second = parametrizations.weight_norm(nn.Conv1d(32, 32, 3, padding=1))
    third = prune.l1_unstructured(nn.Conv1d(32, 1, 7, padding=3), "weight", amount=0.5)
    return nn.Sequential(first, nn.LeakyReLU(0.1), second, nn.LeakyReLU(0.1), third, nn.Tanh())


def main() -> None:
    torch.manual_seed(0)
    net = vocoder().eval()
    mel = torch.randn(2, 8, 100)

    model = fxp.transform(net)
    for site in model.sites:
        print(f"{site.names[0]}: {site.origin}, latents {', '.join(site.latents)}")
    print(f"off from the original by {(model(mel) - net(mel)).abs().max():.1e}")
    print(f"loads the original's checkpoint: {model.load_state_dict(net.state_dict())}")

    plain = fxp.restore(model)
    print(f"plain parameters: {', '.join(name for name, _ in plain.named_parameters())}")
    print(f"folded against restored: {fxp.diff(fxp.fold(plain), fxp.fold(model)) or 'the same graph'}")


if __name__ == "__main__":
    main()
