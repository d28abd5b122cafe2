"""seqkern.LSTM against torch.nn.LSTM: outputs, states and every gradient over the cross of options."""

import pytest
from cases import Case, full_cross, our_layer, sample, wide, wider
from compare import check_parity


@pytest.mark.parametrize("case", sample("lstm"), ids=str)
def test_parity(case: Case, backend: str) -> None:
    layer = case.torch_layer()
    check_parity(layer, our_layer(layer), *case.inputs(), case)


@pytest.mark.parametrize("case", wide("lstm"), ids=str)
def test_parity_of_wide_layers(case: Case, backend: str) -> None:
    layer = case.torch_layer()
    check_parity(layer, our_layer(layer), *case.inputs(), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_cross("lstm") + wider("lstm"), ids=str)
def test_parity_full_cross(case: Case, backend: str) -> None:
    layer = case.torch_layer()
    check_parity(layer, our_layer(layer), *case.inputs(), case)
