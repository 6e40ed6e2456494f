"""What was computed in the given model, computed by hand on the copy, gives the same values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adoption.cases import CASES, legacy_lstm, lstm
from adoption.common import TOLERANCE, assert_same, attach, held, line, names_of, run
from copying.common import fingerprint
from torch import Tensor, nn

from fxparam.errors import ImageError
from fxparam.tracer.copying import structural_copy
from fxparam.tracer.legacy_maps import MaskStep, SpectralNormStep, WeightNormStep


@pytest.mark.parametrize("copy_tensors", [False, True], ids=["shared", "cloned"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_adopted_weights_compute_what_the_model_computes(case: str, training: bool, copy_tensors: bool) -> None:
    make, draw, use, expected_names = CASES[case]
    model = make().train(training)
    x = draw().requires_grad_()
    use(model, x).sum().backward()  # a model that has been trained: legacy weights now hang on a freed graph
    before = fingerprint(model)
    shared, copied = structural_copy(model), structural_copy(model, copy_tensors=copy_tensors)
    assert fingerprint(model) == before
    assert names_of(copied) == expected_names
    assert not copied.notes or case == "nested"

    parameters, buffers = held(shared)
    assert {id(t) for t in (*parameters, *buffers)} == {id(t) for t in (*model.parameters(), *model.buffers())}
    expected = run(model, use, x, parameters, buffers)
    assert_same(run(attach(copied), use, x, *held(copied)), expected)
    assert_same(run(model, use, x, parameters, buffers), expected)

    for adopted in copied.adopted:
        assert adopted.tensor_name not in {**vars(adopted.owner), **adopted.owner._parameters, **adopted.owner._buffers}
        assert not adopted.owner._forward_pre_hooks and "parametrizations" not in adopted.owner._modules
        assert adopted.is_buffer is (case == "buffer")
        assert all(isinstance(original, nn.Parameter) is not adopted.is_buffer for original in adopted.originals)
    use(model, x).sum().backward()  # the given model still trains
    if copy_tensors:
        assert all(parameter.grad is None for parameter in held(copied)[0])


@pytest.mark.parametrize("case", CASES)
def test_several_steps_of_training_stay_together(case: str) -> None:
    make, draw, use, _ = CASES[case]
    model = make()
    copied = structural_copy(model, copy_tensors=True)
    root = attach(copied)
    parameters, clones = held(structural_copy(model))[0], held(copied)[0]
    for _ in range(3):
        x = draw()
        for net, leaves in ((model, parameters), (root, clones)):
            loss = use(net, x).square().sum()
            if leaves:
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
                with torch.no_grad():
                    for leaf, gradient in zip(leaves, gradients, strict=True):
                        if gradient is not None:
                            leaf -= 0.01 * gradient
    for leaf, clone in zip(parameters, clones, strict=True):
        torch.testing.assert_close(clone, leaf, rtol=16 * TOLERANCE, atol=16 * TOLERANCE)


def test_a_spectral_norm_step_may_run_again_before_the_backward_of_its_first_run() -> None:
    model = nn.utils.spectral_norm(nn.Linear(3, 4))
    copied = structural_copy(model, copy_tensors=True)
    root, x, results = attach(copied), line(), []
    for net, leaves in ((model, held(structural_copy(model))[0]), (root, held(copied)[0])):
        results.append(torch.autograd.grad(net(x).sum() - net(-x).square().sum(), leaves))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_no_stale_weight_stays_in_the_lists_of_a_recurrent_module() -> None:
    copied: Any = structural_copy(legacy_lstm()).root
    assert [w is None for w in copied._flat_weights] == [True, True, False, False]
    stale = [ref() for ref in copied._flat_weight_refs]
    assert stale[:2] == [None, None] and None not in copied._flat_weight_refs
    attached: Any = attach(structural_copy(lstm()))
    attached(line())
    assert all(isinstance(weight, Tensor) for weight in attached._flat_weights)
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        _ = copied.weight_hh_l0


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_weight_norm_step_inverts(dim: int) -> None:
    weight, step = torch.randn(4, 3, 2), WeightNormStep(dim)
    torch.testing.assert_close(step(*step.right_inverse(weight)), weight, rtol=TOLERANCE, atol=TOLERANCE)


def test_spectral_norm_step_inverts_what_is_normed() -> None:
    u, s, v = torch.linalg.svd(torch.randn(4, 3), full_matrices=False)
    weight = u @ torch.diag(s / s[0]) @ v
    step = SpectralNormStep(u[:, 0].clone(), v[0].clone(), dim=0, n_power_iterations=1, eps=1e-12)
    torch.testing.assert_close(step(step.right_inverse(weight)), weight, rtol=TOLERANCE, atol=TOLERANCE)


def test_mask_step_inverts_what_is_pruned_and_refuses_the_rest() -> None:
    step = MaskStep(torch.eye(3))
    weight = torch.diag(torch.randn(3))
    assert step.right_inverse(weight) is weight
    with pytest.raises(ImageError, match=r"got a weight of shape \(3, 3\) with 6 entries .* type: weight \* mask"):
        step.right_inverse(torch.ones(3, 3))
