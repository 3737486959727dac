"""A small character-level transformer, and the text that ships with Python to train it on."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 64  # characters
BATCH = 16
_TEXT_BYTES = 3_000_000
_PRINTABLE = 95  # ASCII 32..126 are the first symbols; then the line break and everything else
VOCABULARY = _PRINTABLE + 2


def standard_library_text() -> Tensor:
    """The sources of Python's standard library as symbols, int64 ``[characters]``."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = b""
    for path in sorted(folder.glob("*.py")):
        sources += path.read_bytes()
        if len(sources) >= _TEXT_BYTES:
            break
    if len(sources) <= CONTEXT + 1:
        raise FileNotFoundError(f"no Python sources to train on in {folder}")
    symbol = torch.full((256,), _PRINTABLE + 1)
    symbol[ord("\n")] = _PRINTABLE
    symbol[32:127] = torch.arange(_PRINTABLE)
    return symbol[torch.frombuffer(bytearray(sources), dtype=torch.uint8).long()]


def batches(text: Tensor, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows and what follows each character: int64 ``[BATCH, CONTEXT]`` twice."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
        window = text[starts + torch.arange(CONTEXT + 1)].to(device)
        yield window[:, :-1], window[:, 1:]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.mlp(x)
        return result


class LanguageModel(nn.Module):
    """About 217,000 parameters."""

    def __init__(self, width: int = 64, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits ``[batch, length, VOCABULARY]`` of int64 symbols ``[batch, length]``."""
        x = self.token(symbols) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def loss(self, symbols: Tensor, targets: Tensor) -> Tensor:
        logits = self.forward(symbols)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
