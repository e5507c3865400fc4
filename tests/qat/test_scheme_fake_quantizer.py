"""A scheme with a switch: on, the scheme's values and gradients; off, nothing; never anything to save."""

import torch

from aotrain.ops.fake_quantize import fake_quantize
from aotrain.qat.scheme_fake_quantizer import SchemeFakeQuantizer, fake_quantizer_of
from aotrain.quantization import SCHEMES


def test_quantizes_while_it_is_on():
    scheme = SCHEMES["int2-g32"].weight
    quantizer, x = SchemeFakeQuantizer(scheme), torch.randn(4, 64, requires_grad=True)
    assert torch.equal(quantizer(x), scheme.values(x))
    grads = [torch.autograd.grad(each.sum(), x)[0] for each in (quantizer(x), fake_quantize(x, scheme))]
    assert torch.equal(*grads)
    assert quantizer.arithmetic(x) is scheme
    quantizer.enabled = False
    assert quantizer(x) is x
    assert quantizer.arithmetic(x) is None
    assert "enabled=False" in repr(quantizer)


def test_has_no_state():
    assert fake_quantizer_of(None) is None
    assert not fake_quantizer_of(SCHEMES["int8"].weight).state_dict()
