"""Attention heads: which there are, and what the output projection makes of each."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from saesteer.core.blocks import head_columns
from saesteer.core.model import HookPoint, site_module


def all_heads(model: PreTrainedModel, layers: Sequence[int]) -> list[HookPoint]:
    """Every head of these blocks, in order.

    Raises HookPointError for a block that is not there, or whose heads can't be told apart.
    """
    found = []
    for layer in layers:
        site_module(model, HookPoint(layer, "head.0"))
        count = model.config.get_text_config(decoder=True).num_attention_heads
        found += [HookPoint(layer, f"head.{i}") for i in range(count)]
    return found


def output_weight(model: nn.Module, head: HookPoint) -> Tensor:
    """W_O of one head, [d_model, d_head]: what its output becomes in the block's attention."""
    projection = site_module(model, head)[0]
    weight = projection.get_parameter("weight").detach()
    columns = head_columns(model, head)
    return weight[columns].T if isinstance(projection, Conv1D) else weight[:, columns]
