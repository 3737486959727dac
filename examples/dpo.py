"""Direct preference optimisation with β = 0.1, clipped at 0.5.

    python examples/dpo.py

A policy learns to prefer one answer over another, held near a frozen reference. One batch has its
labels swapped, as preference data do: the loss is steep there, and its step is held to 0.5.
Source of the loss: Rafailov et al. 2023, arXiv 2305.18290.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

import fusedclip

BETA, MAX_NORM = 0.1, 0.5
VOCABULARY, WIDTH, LENGTH, STEPS, SWAPPED = 32, 48, 12, 60, 30


class Policy(nn.Module):
    """The next token from the last one: enough of a language model for a loss of this kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def log_probability(self, tokens: Tensor) -> Tensor:
        """Of whole sequences [batch, length] → [batch]."""
        logits = self.head(torch.tanh(self.hidden(self.embedding(tokens[:, :-1]))))
        each = logits.log_softmax(dim=-1).gather(-1, tokens[:, 1:, None])
        return each.squeeze(-1).sum(dim=1)


def dpo_loss(policy: Policy, reference: Policy, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The mean of -log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected))."""
    with torch.no_grad():
        before = reference.log_probability(chosen) - reference.log_probability(rejected)
    now = policy.log_probability(chosen) - policy.log_probability(rejected)
    return -logsigmoid(BETA * (now - before)).mean()


def main() -> None:
    torch.manual_seed(0)
    policy = Policy()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for step in range(STEPS):
        rejected = torch.randint(VOCABULARY, (64, LENGTH))
        chosen = rejected.sort(dim=1).values  # the preference: tokens in order
        if step == SWAPPED:
            chosen, rejected = rejected, chosen
        loss = dpo_loss(policy, reference, chosen, rejected)
        loss.backward()
        grad_norm = fusedclip.clip_(policy, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == STEPS - 1:
            clipped = ", clipped" if grad_norm > MAX_NORM else ""
            print(f"[Train Step {step}] loss={loss:.3f}, grad_norm={grad_norm:.3f}{clipped}")


if __name__ == "__main__":
    main()
