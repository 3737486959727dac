"""The trainings whose clips are timed in place: small models and models of published shapes.

Data are random numbers from the seed, except the text of the demo's transformer: what a clip costs
does not depend on what is learned. Batches are tiny, so the share of the clip is larger here than
in a training that uses its cores well; its time is the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedclip.demo.language_model import Block, LanguageModel, batches, standard_library_text

from ..workloads import Shape, llama_projections


@dataclass(frozen=True)
class Training:
    parameters: Sequence[nn.Parameter]  # those that are trained
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]  # of the next batch


class Policy(nn.Module):
    """Policy and value, two hidden layers of 64 each, as PPO trains them: 12 tensors."""

    def __init__(self, observed: int = 8, actions: int = 4, width: int = 64) -> None:
        super().__init__()
        self.policy, self.value = (
            nn.Sequential(
                nn.Linear(observed, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                nn.Linear(width, out),
            )
            for out in (actions, 1)
        )  # fmt: skip


def ppo() -> Training:
    """PPO's update, minibatches of 64 of one rollout (Schulman et al. 2017, arXiv 1707.06347)."""
    model = Policy()
    steps = 2048
    seen, action = torch.randn(steps, 8), torch.randint(4, (steps, 1))
    advantage, returns = torch.randn(steps), torch.randn(steps)
    with torch.no_grad():
        old = F.log_softmax(model.policy(seen), dim=1).gather(1, action)
    generator = torch.Generator().manual_seed(0)  # of its own: both arms draw the same minibatches

    def loss() -> Tensor:
        chosen = torch.randint(steps, (64,), generator=generator)
        every = F.log_softmax(model.policy(seen[chosen]), dim=1)
        ratio = (every.gather(1, action[chosen]) - old[chosen]).exp().flatten()
        gain = advantage[chosen]
        policy = torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        value = F.mse_loss(model.value(seen[chosen]).flatten(), returns[chosen])
        entropy = -(every.exp() * every).sum(dim=1).mean()
        return 0.5 * value - policy - 0.01 * entropy

    parameters = list(model.parameters())
    return Training(parameters, torch.optim.Adam(parameters, lr=3e-4, eps=1e-5), loss)


def transformer() -> Training:
    """The demo's."""
    model = LanguageModel()
    stream = batches(standard_library_text(), seed=0, device=torch.device("cpu"))
    parameters = list(model.parameters())
    return Training(
        parameters, torch.optim.SGD(parameters, lr=0.1), lambda: model.loss(*next(stream))
    )


class Adapted(nn.Module):
    """A frozen linear map and its LoRA (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, out: int, into: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(into, out, bias=False).requires_grad_(False)
        self.down = nn.Linear(into, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.frozen(x) + self.up(self.down(x))
        return result


class AdaptedLayer(nn.Module):
    """The seven linear maps of a layer of Llama-2, without attention between positions."""

    def __init__(self, shapes: Sequence[Shape], rank: int) -> None:
        super().__init__()
        maps = [Adapted(out, into, rank) for out, into in shapes]
        self.query, self.key, self.value, self.out, self.gate, self.up, self.down = maps

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:])
        x = x + self.out(torch.sigmoid(self.query(y) * self.key(y)) * self.value(y))
        y = F.layer_norm(x, x.shape[-1:])
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


def lora(layers: int = 32, scale: int = 8, rank: int = 16) -> Training:
    """LoRA on every linear map of Llama-2 7B with each dimension divided by ``scale``: 448 tensors,
    20 MB of gradients."""
    shapes = llama_projections(scale)
    model = nn.Sequential(*(AdaptedLayer(shapes, rank) for _ in range(layers)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(8, shapes[0][1])
    return Training(
        parameters, torch.optim.AdamW(parameters, lr=1e-4), lambda: F.mse_loss(model(x), x)
    )


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *_convolution(into, width, 1), nn.ReLU(),
            *_convolution(width, width, 3, stride), nn.ReLU(),
            *_convolution(width, out, 1),
        )  # fmt: skip
        self.past = nn.Sequential(*_convolution(into, out, 1, stride) if into != out else ())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.past(x))


def _convolution(into: int, out: int, size: int, stride: int = 1) -> Sequence[nn.Module]:
    convolution = nn.Conv2d(into, out, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(out)


def resnet(blocks: Sequence[int] = (3, 4, 6, 3)) -> nn.Sequential:
    """By default ResNet-50 (He et al. 2015, arXiv 1512.03385, table 1)."""
    layers: list[nn.Module] = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            layers.append(Bottleneck(channels, width, 2 if stage and block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def resnet_50(blocks: Sequence[int] = (3, 4, 6, 3)) -> Training:
    """Two images of 64 × 64."""
    model = resnet(blocks)
    parameters = list(model.parameters())
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(1000, (2,))
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    return Training(parameters, optimizer, lambda: F.cross_entropy(model(images), labels))


class Gpt2(nn.Module):
    """By default GPT-2 small (Radford et al. 2019): the head is the embedding."""

    def __init__(self, symbols: int = 50257, context: int = 1024, width: int = 768,
                 layers: int = 12, heads: int = 12) -> None:  # fmt: skip
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.token(symbols) + self.position.weight[: symbols.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.token.weight)


def gpt2(model: Callable[[], Gpt2] = Gpt2) -> Training:
    """One text of 16 symbols."""
    made = model()
    parameters = list(made.parameters())
    symbols = torch.randint(made.token.num_embeddings, (1, 17))

    def loss() -> Tensor:
        return F.cross_entropy(made(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten())

    return Training(parameters, torch.optim.AdamW(parameters, lr=1e-5, fused=True), loss)


@dataclass(frozen=True)
class Loop:
    make: Callable[[], Training]
    block: int  # steps of one contestant before it is the other's turn


LOOPS = {
    "PPO's update": Loop(ppo, 10),
    "the demo's transformer": Loop(transformer, 5),
    "LoRA r=16 of 7B, width ÷ 8": Loop(lora, 1),
    "ResNet-50": Loop(resnet_50, 1),
    "GPT-2 small": Loop(gpt2, 1),
}
