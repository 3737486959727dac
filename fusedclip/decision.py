"""decide: from the norms of a step, by segment, to coefficients and to whether it is left out.

A number, a tensor and a policy are asked in the same way, and nothing waits for the device. Where
the thresholds do not depend on the norms of the step, ``known_before`` has them for the backends'
fused form, and ``after`` is what is left to decide; else ``decide`` does all of it.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fusedclip.backends import reference
from fusedclip.rule import Decision, Rule, Threshold


def known_before(rule: Rule, device: torch.device) -> float | Tensor | None:
    """The thresholds, as a backend's ``clip_`` takes them, if they are known before the norms."""
    limit: Any = rule.max_norm
    if not isinstance(limit, (float, Tensor)):
        if is_dynamo_compiling() or not hasattr(limit, "ahead"):
            return None
        limit = limit.ahead(rule.segments.count, device)
        if limit is None:
            return None
    return _shaped(limit, rule)


def _shaped(limit: float | Tensor, rule: Rule) -> float | Tensor:
    """As backends take it: of one norm a number or 0-dim, else a vector."""
    count = rule.segments.count
    if not rule.by_segment:
        return limit.reshape(()) if isinstance(limit, Tensor) else limit
    if isinstance(limit, Tensor):
        if limit.dim() == 1:
            return limit
        return limit.to(torch.float64).expand(count).contiguous()
    return torch.full((count,), limit, dtype=torch.float64, device="cpu")


def decide(rule: Rule, norms: Tensor) -> Decision:
    """Everything, for norms that are 0-dim or ``[segments]``."""
    limit: Any = rule.max_norm
    if hasattr(limit, "decide"):
        decision: Decision = limit.decide(norms, _whole(rule, norms))
        factors = reference.of_nonfinite(decision.coefficients, norms.reshape(-1), rule.nonfinite)
        thresholds, skip = decision.thresholds, decision.skip
    else:
        thresholds = limit if isinstance(limit, (float, Tensor)) else limit.threshold(norms)
        factors = reference.coefficient(norms.reshape(-1), thresholds, rule.nonfinite)
        skip = None
    return Decision(factors, thresholds, _either(skip, _skip(rule, norms)))


def after(rule: Rule, norms: Tensor, thresholds: float | Tensor) -> Tensor | None:
    """Whether to leave the step out, once ``known_before``'s thresholds have been applied."""
    limit: Any = rule.max_norm
    skip = None
    if not isinstance(limit, (float, Tensor)):
        skip = limit.remember(norms, _whole(rule, norms) if limit.may_skip else None)
    return _either(skip, _skip(rule, norms))


def _skip(rule: Rule, norms: Tensor) -> Tensor | None:
    """A step is taken if its norm is at most the limit, so not if it is NaN."""
    limit: Threshold | None = rule.skip_above
    if limit is None:
        return None
    whole = _whole(rule, norms)
    if hasattr(limit, "decide"):
        skip: Tensor | None = limit.decide(whole, whole).skip
        return skip
    if not isinstance(limit, (float, Tensor)):
        limit = limit.threshold(whole)
    if isinstance(limit, Tensor):
        limit = limit.to(whole.device, non_blocking=True)
    return ~(whole <= limit)


def _either(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one | other


def _whole(rule: Rule, norms: Tensor) -> Tensor:
    """The norm of the step as a whole, 0-dim: that of the segments' norms."""
    if norms.dim() == 0 or norms.numel() == 1:
        return norms.reshape(())
    order = rule.norm_type
    if order == 0.0:
        return norms.sum()
    if math.isinf(order):
        whole: Tensor = norms.amax() if order > 0.0 else norms.amin()
        return whole
    whole = torch.linalg.vector_norm(norms, order, dtype=torch.float64)
    return whole
