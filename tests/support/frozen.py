"""Small frozen models as files: a vision model of Hugging Face and a feature extractor."""

import warnings

import torch
from torch import Tensor, nn


def write_dinov2(folder):
    """A tiny random DINOv2 in the format of the real one."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


class Colours(nn.Module):
    """Mean and largest value of each colour as features, their softmax as classes."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        features = torch.cat([images.mean([2, 3]), images.amax([2, 3])], 1)
        return features if return_features else features.softmax(-1)


def write_extractor(path):
    """A tiny feature extractor as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Colours()).save(path)
    return str(path)
