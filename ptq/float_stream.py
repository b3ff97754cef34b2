"""The parent of a run in float32, whatever its dtype: half precision would drown what is measured on it."""

import copy

import torch

from ptq.models.loading import build_skeleton
from ptq.models.names import SourceNames
from ptq.models.streamed import StreamedModel
from ptq.plan import Plan, parent_stream


def float_stream(plan: Plan) -> StreamedModel:
    """The parent in float32, in a skeleton of its own."""
    config = copy.deepcopy(plan.hf_config)
    skeleton = build_skeleton(config, torch.float32, trust_remote_code=plan.config.trust_remote_code)
    names = SourceNames(skeleton, plan.reader.names())
    return parent_stream(plan._replace(skeleton=skeleton, names=names, dtype=torch.float32))
