"""Tests of `mergevq.runtime.device`."""

import pytest
import torch

from mergevq.runtime.device import (
    autocast,
    decodes_in_one_shape,
    full_float32,
    has_fused_optimizers,
    lay_out,
    layout_for,
    precision_name,
    resolve_device,
    resolve_precision,
    rounded_float32,
    steps_between_reads,
)

CPU = torch.device("cpu")


# -------------------------------------------------------------------------- device and precision


def test_the_cpu_is_always_there_and_auto_finds_something():
    assert resolve_device("cpu") == CPU
    assert torch.ones(1, device=resolve_device("auto")).item() == 1


def test_auto_prefers_a_gpu_and_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"device \(cuda\) must be .*: auto or cpu$"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"


def test_an_unknown_device_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"device \(tpu\) must be one .* auto or .*cpu"):
        resolve_device("tpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, None),
    ],
)
def test_auto_precision_on_a_cpu_is_what_it_multiplies(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) is expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_precision_on_a_gpu_does_not_count_emulation(monkeypatch, native, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native
    )
    assert resolve_precision("auto", torch.device("cuda")) is expected


def test_float16_is_never_chosen_but_given_on_request():
    assert resolve_precision("auto", torch.device("mps")) is None
    assert resolve_precision("float32", CPU) is None
    assert resolve_precision("bf16", CPU) is torch.bfloat16
    assert resolve_precision("float16", CPU) is torch.float16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_multiplies_in_the_given_dtype(dtype):
    with autocast(CPU, dtype):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (dtype or torch.float32)


def test_no_dtype_means_float32_even_inside_another_autocast():
    with autocast(CPU, torch.bfloat16), autocast(CPU, None):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "dtype", "layout"),
    [
        ("cpu", None, torch.contiguous_format),
        ("cpu", torch.bfloat16, torch.channels_last),
        ("cuda", None, torch.channels_last),
        ("cuda", torch.bfloat16, torch.channels_last),
        ("mps", None, torch.contiguous_format),
    ],
)
def test_the_layout_is_that_which_gains(device, dtype, layout):
    assert layout_for(torch.device(device), dtype) == layout


def test_a_module_is_laid_out_without_a_change_of_its_weights():
    conv = torch.nn.Conv2d(3, 4, 3)
    weight = conv.weight.detach().clone()
    lay_out(conv, CPU, torch.bfloat16)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv.weight, weight)
    lay_out(conv, CPU, None)
    assert conv.weight.is_contiguous()


def test_every_dtype_has_a_name_that_gives_it_again():
    for name in ("bf16", "float16", "float32"):
        assert precision_name(resolve_precision(name, CPU)) == name


def test_float32_is_rounded_on_a_gpu_in_training_alone_and_whole_in_metrics():
    gpu, whole = torch.device("cuda"), torch.get_float32_matmul_precision()
    with rounded_float32(gpu, torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "high"
        with full_float32(gpu):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == whole
    for device, dtype in ((gpu, None), (torch.device("cpu"), torch.bfloat16)):
        with rounded_float32(device, dtype):
            assert torch.get_float32_matmul_precision() == whole


def test_only_gpus_are_not_waited_for():
    """Skipping on the device needs an optimizer that does it by itself."""
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    assert [steps_between_reads(each) for each in (cpu, cuda, mps)] == [1, 10, 1]
    assert [has_fused_optimizers(each) for each in (cpu, cuda, mps)] == [True, True, False]
    assert [decodes_in_one_shape(each) for each in (cpu, cuda, mps)] == [False, True, False]
