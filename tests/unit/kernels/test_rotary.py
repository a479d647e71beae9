"""Rotary position embedding: the specification, and its Triton form against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megalm.kernels.rotary import oracle, triton_rotary

CPU = torch.device("cpu")


def example(dtype: torch.dtype, device: torch.device, *, size: int, head: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 3, 37, head, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    return x, oracle.rotary_angles(37, size, device=device)


def test_scores_depend_on_distance_alone() -> None:
    angles = oracle.rotary_angles(50, 16, device=CPU).double()
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned_q, turned_k = (oracle.rotary(v.expand(1, 1, 50, 16), angles)[0, 0] for v in (q, k))
    scores = turned_q @ turned_k.t()
    # Angles are rounded to fp32: 50 * 2^-24.
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)


def test_position_zero_stays_and_a_pair_turns_by_its_angle() -> None:
    angles = oracle.rotary_angles(3, 4, base=100.0, device=CPU)
    torch.testing.assert_close(angles[2], torch.tensor([2.0, 0.2]))
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0]).expand(1, 1, 3, 5)
    turned = oracle.rotary(x, angles)
    assert torch.equal(turned[0, 0, 0], x[0, 0, 0])
    expected = torch.tensor([math.cos(2), -math.sin(0.2), math.sin(2), math.cos(0.2), 5.0])
    torch.testing.assert_close(turned[0, 0, 2], expected)


def test_rotary_equals_the_one_of_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, angles = example(torch.float32, CPU, size=16, head=16)
    cos, sin = (torch.cat((part, part), dim=-1)[None] for part in (angles.cos(), angles.sin()))
    turned, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)
    # The same products, added in the same order, perhaps contracted.
    torch.testing.assert_close(oracle.rotary(x, angles), turned, rtol=0, atol=1e-6)


def test_an_odd_number_of_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="size = 7 must be even"):
        oracle.rotary_angles(3, 7, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, head", [(16, 16), (6, 20), (2, 2)])
def test_triton_form_rounds_once_forward_and_backward(
    size: int, head: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    x, angles = example(dtype, triton_device, size=size, head=head)
    exact = x.detach().double().requires_grad_()
    result, expected = triton_rotary.rotary(x, angles), oracle.rotary(exact, angles.double())
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(triton_device, dtype)
    result.backward(incoming)
    expected.backward(incoming.double())
    for ours, reference in ((result, expected), (x.grad, exact.grad)):
        # Half an epsilon for the rounding; fp32 arithmetic on numbers below 8.
        bound = 0.5 * torch.finfo(dtype).eps * reference.abs() + 8 * 2**-22
        assert ours.dtype == dtype
        assert ((ours.double() - reference).abs() <= bound).all()


def test_triton_form_takes_heads_out_of_a_joint_projection(triton_device: torch.device) -> None:
    mixed = torch.randn(37, 2, 3, 3, 16, generator=torch.Generator().manual_seed(0)).to(triton_device)
    q = mixed[:, :, :, 0].permute(1, 2, 0, 3)  # [s, b, n, 3, d] -> [b, n, s, d]
    angles = oracle.rotary_angles(37, 16, device=triton_device)
    assert torch.equal(triton_rotary.rotary(q, angles), triton_rotary.rotary(q.contiguous(), angles))
    assert triton_rotary.rotary(q[:0], angles).shape == (0, 3, 37, 16)


@pytest.mark.parametrize("shape", [(36, 8), (37, 9)])
def test_angles_that_do_not_fit_are_refused_before_they_are_read(shape: tuple[int, int]) -> None:
    x, _ = example(torch.float32, CPU, size=16, head=16)
    with pytest.raises(ValueError, match=r"do not fit 37 positions of heads of 16"):
        triton_rotary.rotary(x, torch.zeros(shape))
