"""seqkern.GRU against torch.nn.GRU: outputs, states and every gradient over the cross of options."""

import pytest
from cases import Case, full_cross, our_layer, sample, wide, wider
from compare import check_parity


@pytest.mark.parametrize("case", sample("gru"), ids=str)
def test_parity(case: Case, backend: str) -> None:
    layer = case.torch_layer()
    check_parity(layer, our_layer(layer), *case.inputs(), case)


@pytest.mark.parametrize("case", wide("gru"), ids=str)
def test_parity_of_wide_layers(case: Case, backend: str) -> None:
    layer = case.torch_layer()
    check_parity(layer, our_layer(layer), *case.inputs(), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_cross("gru") + wider("gru"), ids=str)
def test_parity_full_cross(case: Case, backend: str) -> None:
    layer = case.torch_layer()
    check_parity(layer, our_layer(layer), *case.inputs(), case)
