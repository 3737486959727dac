"""Where to start with the threshold: what published runs and the frameworks' defaults use."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recommendation:
    """A threshold for the global L2 norm to start from; ``str()`` of it says why."""

    max_norm: float  # start here
    low: float  # and stay within [low, high] unless the log says otherwise
    high: float
    required: bool  # whether a run is not to be started without clipping
    reason: str
    source: str
    beside: str = ""  # what else goes well with it

    def __str__(self) -> str:
        usual = f" ({self.low} to {self.high})" if self.low < self.high else ""
        need = ", required" if self.required else ""
        beside = f"\nBeside it: {self.beside}" if self.beside else ""
        start = f"max_norm={self.max_norm}{usual}{need}"
        return f"{start}\nWhy: {self.reason}\nSource: {self.source}{beside}"


_PREFERENCE_SOURCE = (
    "1.0 is Transformers' default, which TRL's {0}Config keeps beside beta=0.1; NVIDIA NeMo's "
    "DpoParameters advise 0.5 against instability"
)

_TASKS = {
    "sft": Recommendation(
        max_norm=1.0,
        low=1.0,
        high=1.0,
        required=False,
        reason="a pretrained model has small gradients, so 1.0 touches only the outliers: bad "
        "samples and the first steps of the warm-up",
        source="the default max_grad_norm=1.0 of Transformers' TrainingArguments, also for TRL's "
        "SFTTrainer and ms-swift",
    ),
    "dpo": Recommendation(
        max_norm=1.0,
        low=0.5,
        high=1.0,
        required=False,
        reason="beta scales the gradient: with beta near 0.1 the norm is small until a pair is "
        "ranked wrongly by far, and one such pair can turn a step",
        source=_PREFERENCE_SOURCE.format("DPO")
        + "; the reference code of the paper (arXiv 2305.18290) clips at 10",
    ),
    "kto": Recommendation(
        max_norm=1.0,
        low=0.5,
        high=1.0,
        required=False,
        reason="as for DPO with beta near 0.1; unbalanced desirable and undesirable samples make "
        "the norm vary more",
        source=_PREFERENCE_SOURCE.format("KTO") + " (KTO: arXiv 2402.01306)",
    ),
    "ppo": Recommendation(
        max_norm=0.5,
        low=0.5,
        high=1.0,
        required=False,
        reason="advantages and value targets change with the policy, so norms jump from batch to "
        "batch; a tight threshold keeps the update near the policy that sampled it",
        source="0.5: OpenAI baselines' PPO2, as studied in arXiv 2005.12729, and CleanRL; 1.0: "
        "Transformers' default, which TRL's PPOConfig keeps",
    ),
    "pretrain": Recommendation(
        max_norm=1.0,
        low=1.0,
        high=1.0,
        required=True,
        reason="early norms are many times the later ones and loss spikes come at any time; one "
        "unclipped step can cost the run",
        source="GPT-3 (arXiv 2005.14165, appendix B), LLaMA (arXiv 2302.13971, section 2.3) and "
        "Megatron-LM's --clip-grad, all 1.0",
        beside="skip_above=SkipSpikes() leaves out the spikes themselves (OLMo-core); AdaGC() with "
        'scope="parameter" follows each parameter (arXiv 2502.11034)',
    ),
    "explore": Recommendation(
        max_norm=1.0,
        low=1.0,
        high=2.0,
        required=False,
        reason="clipping is what makes high rates survive; go up to 2.0 when most steps are "
        "clipped and the loss still falls smoothly",
        source="arXiv 1905.11881 shows that clipped descent stands larger steps; the range is "
        "fusedclip's, no paper fixes it",
        beside="ZClip() follows norms that change with the rate (arXiv 2504.02507)",
    ),
}

TASKS = tuple(_TASKS)

_LORA_REASON = (
    "only the adapters have gradients, so the norm is that of a few million numbers, and 1.0 "
    "touches the outliers only"
)
_QLORA_REASON = (
    "the 4-bit base model adds quantisation noise to every gradient and the usual rates are high "
    "(2e-4 in the paper)"
)
_QLORA_SOURCE = (
    "the paper itself clips harder, at 0.3 (arXiv 2305.14314, appendix B.2); 1.0 is Transformers' "
    "default"
)


def recommend(task: str, *, lora: bool = False, qlora: bool = False) -> Recommendation:
    """A threshold to start from, with the reason and its source.

    Args:
        task: ``"sft"``, ``"dpo"``, ``"kto"``, ``"ppo"``, ``"pretrain"`` (all weights, from scratch)
            or ``"explore"`` (a search with high learning rates).
        lora: only low-rank adapters are trained.
        qlora: the same on a 4-bit base model.

    Raises:
        ValueError: an unknown task, or adapters with ``"pretrain"``.

    >>> fusedclip.recommend("sft", lora=True).max_norm
    1.0
    """
    if task not in _TASKS:
        raise ValueError(f"task: expected one of {TASKS}, got {task!r}")
    if task == "pretrain" and (lora or qlora):
        raise ValueError(
            'task="pretrain" trains every weight, so there are no adapters; for adapters on a '
            'pretrained model say task="sft"'
        )
    found = _TASKS[task]
    if qlora:
        return replace(
            found, max_norm=0.5, low=0.5, high=1.0, reason=_QLORA_REASON, source=_QLORA_SOURCE
        )
    if lora and task == "sft":
        return replace(found, reason=_LORA_REASON)
    return found
