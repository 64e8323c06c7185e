"""Percentiles and the dropping of unreliable labels, against NumPy and by hand."""

import numpy as np
import pytest
import torch

from kernels import drop_unreliable, masked_percentile


def test_entropies_and_thresholds_are_compared_in_float32(where):
    """In bfloat16 0.5005 is 0.5."""
    impl, device = where
    entropy = torch.tensor([[[0.5, 0.25, 0.75]]], dtype=torch.bfloat16, device=device)
    label = torch.zeros(1, 1, 3, dtype=torch.uint8, device=device)
    found, kept = drop_unreliable(label, entropy, 0.5005, impl=impl)
    assert found.tolist() == [[[0, 0, 255]]] and kept.item() == 2


@pytest.mark.parametrize("kind", ["normal", "ties", "tiny", "constant", "wide"])
@pytest.mark.parametrize("count", [1, 2, 3, 1000, 5000])
def test_percentile_is_numpys_in_float64(count, kind, where):
    impl, device = where
    generator = torch.Generator().manual_seed(count)
    normal = torch.randn(count, generator=generator)
    values = {
        "normal": normal, "ties": normal.round(), "tiny": normal.abs() * 1e-40,
        "constant": torch.full((count,), -2.5),
        "wide": normal * 10 ** torch.randint(-30, 30, (count,), generator=generator).float(),
    }[kind]  # fmt: skip
    valid = torch.rand(count, generator=generator) > 0.3
    valid[0] = True
    queries = [0, 5.0, 37.5, 37.5, 80, 99.99, 100]
    result = masked_percentile(values.to(device), valid.to(device), queries, impl=impl)
    expected = [np.percentile(values[valid].double().numpy(), q) for q in queries]
    torch.testing.assert_close(result.cpu(), torch.tensor(expected).float(), rtol=2e-7, atol=0)


def test_percentile_of_nothing_of_one_number_and_of_a_tensor(where):
    impl, device = where
    values = torch.arange(6.0, device=device).view(2, 3)
    valid = values > 0
    assert masked_percentile(values, valid & False, [20, 80], impl=impl).isnan().all()
    assert masked_percentile(values[:0], valid[:0], [20, 80], impl=impl).isnan().all()
    assert masked_percentile(values, valid, 50, impl=impl).tolist() == [3]
    queries = torch.tensor([75.0, 25.0], device=device)
    assert masked_percentile(values, valid, queries, impl=impl).tolist() == [4, 2]
    with pytest.raises(ValueError, match="100"):
        masked_percentile(values, valid, 100.5, impl=impl)
    with pytest.raises(ValueError, match="bool mask"):
        masked_percentile(values, values, 50, impl=impl)
    for nothing in ([], torch.empty(0), torch.empty(0, device=device)):
        with pytest.raises(ValueError, match="no percentiles"):
            masked_percentile(values, valid, nothing, impl=impl)


def test_drop_unreliable(where):
    impl, device = where
    label = torch.tensor([[[0, 1, 255, 2, 3]]], dtype=torch.uint8, device=device)
    entropy = torch.tensor([[[0.1, 0.5, 0.0, 0.7, float("inf")]]], device=device)
    before = label.clone()
    kept, count = drop_unreliable(label, entropy, torch.tensor(0.5, device=device), impl=impl)
    assert (
        kept.tolist() == [[[0, 255, 255, 255, 255]]]
        and count.item() == 1
        and torch.equal(label, before)
    )
    all_kept, count = drop_unreliable(label, entropy, float("nan"), impl=impl)
    assert torch.equal(all_kept, label) and count.item() == 4
    for other in (-1, 300):
        with pytest.raises(ValueError, match=f"uint8 labels cannot be {other}"):
            drop_unreliable(label, entropy, 0.5, ignore_index=other, impl=impl)
