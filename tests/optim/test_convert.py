"""convert_state: between formats, from torch, and from the layouts of torchao and bitsandbytes."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from aotrain import optim
from aotrain.optim import AdamW4bit, AdamW8bit, AdamW32bit, AdamWFp8, convert_state
from aotrain.testing import assert_bitwise_equal, sqnr

FORMATS = [AdamW8bit, AdamW4bit, AdamWFp8, AdamW32bit]
# dB between a moment and its conversion, by the coarser of the two formats.
SQNR_DB = {"AdamW8bit": 30.0, "AdamW4bit": 10.0, "AdamWFp8": 25.0, "AdamW32bit": 140.0, "AdamW": 140.0}
by_name = {"ids": lambda value: value.__name__}


def trained(cls, steps: int = 3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 96), nn.Linear(96, 71))
    optimizer = cls(model.parameters(), lr=3e-3, weight_decay=0.03, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 512)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def moments(optimizer) -> dict[tuple[int, str], torch.Tensor]:
    """Every moment of an optimizer in float32, through the conversion to torch's layout."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    exported = convert_state(optimizer.state_dict(), torch.optim.AdamW(params))
    return {(i, key): entry[key] for i, entry in exported["state"].items() for key in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("target", [*FORMATS, torch.optim.AdamW], **by_name)
@pytest.mark.parametrize("source", [*FORMATS, torch.optim.AdamW], **by_name)
def test_every_format_to_every_other(source, target):
    model, from_optimizer = trained(source)
    before = copy.deepcopy(from_optimizer.state_dict())
    to_optimizer = target(model.parameters(), lr=1.0)
    to_optimizer.load_state_dict(convert_state(from_optimizer.state_dict(), to_optimizer))
    assert to_optimizer.param_groups[0]["lr"] == 3e-3
    assert to_optimizer.param_groups[0]["weight_decay"] == 0.03
    assert float(to_optimizer.state[model[0].weight]["step"]) == 3
    want, got = moments(from_optimizer), moments(to_optimizer)
    bound = min(SQNR_DB[source.__name__], SQNR_DB[target.__name__])
    for key in want:
        assert sqnr(want[key], got[key]) > bound, key
    to_optimizer.step()
    after = from_optimizer.state_dict()
    for key, value in before["state"][0].items():
        assert_bitwise_equal(after["state"][0][key], value)


def test_equal_formats_are_copied_bit_for_bit():
    for cls in FORMATS:
        model, source = trained(cls)
        converted = convert_state(source.state_dict(), cls(model.parameters()))
        for index, entry in source.state_dict()["state"].items():
            for key, value in entry.items():
                assert_bitwise_equal(converted["state"][index][key], value)


def test_another_block_size():
    model, source = trained(AdamW8bit, block_size=64)
    target = AdamW8bit(model.parameters(), block_size=256)
    target.load_state_dict(convert_state(source.state_dict(), target))
    assert target.state[model[0].weight]["exp_avg_scale"].shape == (96, 2)
    for key, value in moments(source).items():
        assert sqnr(value, moments(target)[key]) > SQNR_DB["AdamW8bit"]


@dataclass
class OtherLibraryState:
    """What torchao's 8-bit state exposes: flat blocks of 256 over the whole tensor."""

    codes: torch.Tensor
    scale: torch.Tensor
    qmap: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        return (self.qmap[self.codes.long()].view(-1, 256) * self.scale[:, None]).view(self.codes.shape)


def flat_state(shape, signed: bool):
    from aotrain.formats.codebook import dynamic_codebook

    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    return codes, torch.rand(codes.numel() // 256) + 0.1, dynamic_codebook(signed, torch.device("cpu"))


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes", "bitsandbytes 0.50"])
def test_flat_8bit_state_of_other_libraries_is_taken_bit_for_bit(library: str):
    weight = nn.Parameter(torch.zeros(64, 512))
    first, second = flat_state((64, 512), True), flat_state((64, 512), False)
    if library == "torchao":
        entry = {
            "exp_avg": OtherLibraryState(*first),
            "exp_avg_sq": OtherLibraryState(*second),
            "step": torch.tensor(7.0),
        }
    else:
        names = ("state", "absmax", "qmap")
        entry = {f"{name}{i}": t for i, s in ((1, first), (2, second)) for name, t in zip(names, s, strict=True)}
        if library == "bitsandbytes 0.50":
            entry = {"__bnb_optimizer_quant_state__": entry}
        entry["step"] = 7
    source = {"state": {0: entry}, "param_groups": [{"params": [0], "lr": 0.5}]}
    optimizer = AdamW8bit([weight])
    optimizer.load_state_dict(convert_state(source, optimizer))
    state = optimizer.state[weight]
    assert_bitwise_equal(state["exp_avg_codes"], first[0])
    assert_bitwise_equal(state["exp_avg_scale"], first[1].view(64, 2))
    assert_bitwise_equal(state["exp_avg_sq_codes"], second[0])
    assert float(state["step"]) == 7
    assert optimizer.param_groups[0]["lr"] == 0.5
    # Rows of another length than the blocks: through float32.
    odd = nn.Parameter(torch.zeros(128, 256 + 128))
    source["state"][0] = {
        "state1": torch.randint(0, 256, (49152,), dtype=torch.uint8),
        "absmax1": torch.rand(192),
        "qmap1": first[2],
        "state2": torch.rand(128, 384),
        "step": 1,
    }
    converted = convert_state(source, AdamW8bit([odd]))
    assert converted["state"][0]["exp_avg_codes"].shape == (128, 384)


@dataclass
class OtherLibrary4bitState(OtherLibraryState):
    """torchao's 4-bit state: two codes per byte in one row, flat blocks of 128."""

    shape: torch.Size

    def dequantize(self) -> torch.Tensor:
        values = self.qmap[torch.stack([self.codes >> 4, self.codes & 15], dim=-1).long()]
        return (values.view(-1, 128) * self.scale[:, None]).view(self.shape)


@dataclass
class OtherLibraryFp8State:
    """torchao's float8 state: flat blocks of 256."""

    codes: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        return (self.codes.float().view(-1, 256) * self.scale[:, None]).view(self.codes.shape)


def test_flat_4bit_and_float8_state_is_taken_bit_for_bit():
    from aotrain.formats.codebook import dynamic_codebook

    weight = nn.Parameter(torch.zeros(64, 512))
    packed = torch.randint(0, 256, (64 * 256,), dtype=torch.uint8)
    maps = [dynamic_codebook(signed, torch.device("cpu"), bits=4) for signed in (True, False)]
    as_4bit = [OtherLibrary4bitState(packed, torch.rand(256) + 0.1, qmap, weight.shape) for qmap in maps]
    as_fp8 = [OtherLibraryFp8State(torch.randn(64, 512).to(torch.float8_e4m3fn), torch.rand(128) + 0.1)] * 2
    for cls, moments_of, per_row in ((AdamW4bit, as_4bit, 4), (AdamWFp8, as_fp8, 2)):
        entry = dict(zip(("exp_avg", "exp_avg_sq"), moments_of, strict=True)) | {"step": torch.tensor(7.0)}
        converted = convert_state({"state": {0: entry}, "param_groups": [{"params": [0]}]}, cls([weight]))["state"][0]
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments_of, strict=True):
            assert_bitwise_equal(converted[f"{name}_codes"].flatten(), moment.codes.view(torch.uint8).flatten())
            assert_bitwise_equal(converted[f"{name}_scale"], moment.scale.view(64, per_row))


def test_codes_of_an_unknown_map_go_through_their_values():
    weight = nn.Parameter(torch.zeros(64, 512))
    codes, scale, qmap = flat_state((64, 512), True)
    linear = torch.linspace(-1.0, 1.0, 256)
    entries = [
        {"state1": codes, "absmax1": scale, "qmap1": used, "state2": torch.rand(64, 512)} for used in (qmap, linear)
    ]
    for entry, same in zip(entries, (True, False), strict=True):
        source = {"state": {0: entry | {"step": 1}}, "param_groups": [{"params": [0]}]}
        converted = convert_state(source, AdamW8bit([weight]))["state"][0]
        assert converted["exp_avg_codes"].equal(codes) is same
        exported = convert_state(source, torch.optim.AdamW([weight]))["state"][0]["exp_avg"]
        assert_bitwise_equal(exported, entry["qmap1"][codes.long()] * scale.view(64, 2).repeat_interleave(256, 1))


def test_groups_keep_their_own_options():
    model, source = trained(torch.optim.AdamW)
    groups = [{"params": [model[0].weight], "bits": 4}, {"params": [model[0].bias, *model[1].parameters()], "bits": 32}]
    target = AdamW8bit(groups)
    target.load_state_dict(convert_state(source.state_dict(), target))
    assert target.state[model[0].weight]["exp_avg_codes"].shape == (96, 256)
    assert "exp_avg" in target.state[model[1].weight]


def test_parameters_are_matched_by_name_where_both_have_names():
    """The two middle layers have one shape: by position, another order of groups would swap their state unnoticed."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    source = torch.optim.AdamW(model.named_parameters())
    for layer in model:
        layer.weight.grad = torch.randn(64, 64)
    source.step()
    groups = [{"params": [model[i].weight], "param_names": [f"{i}.weight"]} for i in (1, 0)]
    swapped = AdamW32bit(groups)
    swapped.load_state_dict(convert_state(source.state_dict(), swapped))
    for layer in model:
        assert_bitwise_equal(swapped.state[layer.weight]["exp_avg"], source.state[layer.weight]["exp_avg"])
    swapped.param_groups[0]["param_names"] = ["2.weight"]
    with pytest.raises(ValueError, match=r"no state of '2\.weight'.*0\.weight, 1\.weight"):
        convert_state(source.state_dict(), swapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd["state"][0].pop("exp_avg_sq"), "no exp_avg_sq in the state of parameter 0"),
        (lambda sd: sd["state"][0].update(exp_avg=torch.ones(5)), "5 elements for parameter 0"),
        (lambda sd: sd["state"][0]["exp_avg"].fill_(torch.nan), "exp_avg of parameter 0 .* NaN"),
        (lambda sd: sd["param_groups"][0].update(params=[0, 1, 2]), "3 parameters for an optimizer of 4"),
    ],
    ids=["missing", "another model", "NaN", "fewer"],
)
def test_bad_sources_are_named(change, message: str):
    model, source = trained(torch.optim.AdamW)
    state = copy.deepcopy(source.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        convert_state(state, AdamW8bit(model.parameters()))


def test_amsgrad_needs_its_third_moment():
    model, source = trained(torch.optim.AdamW)
    with pytest.raises(ValueError, match="no max_exp_avg_sq"):
        convert_state(source.state_dict(), AdamW8bit(model.parameters(), amsgrad=True))
    model, source = trained(torch.optim.AdamW, amsgrad=True)
    target = AdamW8bit(model.parameters(), amsgrad=True)
    target.load_state_dict(convert_state(source.state_dict(), target))


def test_loading_without_converting_says_how():
    model, source = trained(AdamW4bit)
    with pytest.raises(ValueError, match=r"bits=4.*bits=8.*convert_state"):
        AdamW8bit(model.parameters()).load_state_dict(source.state_dict())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.up = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(128)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight


def test_precision_groups():
    model = Tied()
    model.norm.bias.requires_grad_(False)
    own, embedding = sorted(optim.precision_groups(model), key=lambda group: "bits" in group)
    assert "bits" not in own
    assert own["param_names"] == ["up.weight", "up.bias", "norm.weight"]
    assert (embedding["bits"], embedding["param_names"]) == (32, ["embed.weight"])
    (everything,) = optim.precision_groups(model, embedding_bits=None)
    assert len(everything["params"]) == 4
    groups = optim.precision_groups(model, {"^up": "4", "embed": 8})
    assert {group.get("bits"): group["param_names"] for group in groups} == {
        8: ["embed.weight"],
        4: ["up.weight", "up.bias"],
        None: ["norm.weight"],
    }
    optimizer = AdamW8bit(groups)
    assert [group["bits"] for group in optimizer.param_groups] == [8, 4, 8]
    with pytest.raises(ValueError, match=r"'lm_head' matches no trainable parameter; the model has embed\.weight"):
        optim.precision_groups(model, {"lm_head": 32})
