"""muP draft (temporary: the lesson exports it)"""
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import CausalLM, Decoder
from ..models.families.granite import ScaledConfig
from ..utils.checks import check_int
from .muon import update_scale


@dataclass(frozen=True, kw_only=True)
class MupConfig:
    base_d_model: int | None = None
    base_n_layers: int | None = None
    base_d_head: int | None = None

    def ratios(self, decoder):
        D, L = decoder.d_model, len(decoder.blocks)
        return D / (self.base_d_model or D), L / (self.base_n_layers or L)

    def head_sizes(self, decoder):
        Dh = decoder.blocks[0].attention.head_sizes(decoder.d_model)[2]
        return Dh, self.base_d_head or Dh

    def model(self, config):
        if self == MupConfig():
            return config
        if not hasattr(config, "residual_multiplier"):
            config = ScaledConfig(family=config)
        decoder = config.decoder()
        m, l = self.ratios(decoder)
        Dh, base_Dh = self.head_sizes(decoder)
        std = decoder.init_std / math.sqrt(m)
        changes = dict(
            init_std=std, embed_std=decoder.init_std,
            residual_std=std / math.sqrt(2 * len(decoder.blocks) / l),
            residual_multiplier=config.residual_multiplier / l,
            logits_scaling=config.logits_scaling * m)
        if Dh != base_Dh:
            scale = config.attention_multiplier or base_Dh**-0.5
            changes["attention_multiplier"] = scale * base_Dh / Dh
        return replace(config, **changes)

    def optimizer(self, inner):
        return inner if self == MupConfig() else MupOptimizer(mup=self, inner=inner)

    def factors(self, name, p, group, decoder):
        m, l = self.ratios(decoder)
        in_block = re.search(r"(^|\.)layers\.\d+\.", name) is not None
        eps = 1 / (m * l) if in_block else 1 / m
        if not in_block or p.ndim < 2:
            return 1.0, eps
        if "adjust_lr" not in group:
            return 1 / m, eps
        Dh, base_Dh = self.head_sizes(decoder)
        rows, cols = p.shape[-2:]
        base_rows = rows / m
        if group["d_head"]:
            rows, base_rows = Dh, base_Dh
        return (spectral((rows, cols), group["adjust_lr"])
                / spectral((base_rows, cols / m), group["adjust_lr"])), eps


def spectral(shape, adjust_lr):
    return math.sqrt(shape[0] / shape[1]) / update_scale(shape, adjust_lr)


@dataclass(frozen=True, kw_only=True)
class MupOptimizer:
    mup: MupConfig
    inner: Any

    def build(self, model):
        optimizer = self.inner.build(model)
        decoder = next(m for m in model.modules() if isinstance(m, Decoder)).config
        names = {p: name for name, p in model.named_parameters()}
        groups, n_matrix = [], 0
        for group in optimizer.param_groups:
            parts = {}
            for p in group["params"]:
                parts.setdefault(self.mup.factors(names[p], p, group, decoder), []).append(p)
            for (lr, eps), params in parts.items():
                new = {**group, "params": params, "lr": group["lr"] * lr,
                       "weight_decay": group["weight_decay"] / lr}
                if "eps" in group:
                    new["eps"] = group["eps"] * eps
                groups.append(new)
                n_matrix += "adjust_lr" in group
        optimizer.param_groups = groups
        if hasattr(optimizer, "n_matrix_groups"):
            optimizer.n_matrix_groups = n_matrix
        return optimizer
