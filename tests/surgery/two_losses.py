"""A small net with a forget and a retain loss, and their gradients as flat vectors."""

import torch
from torch import Tensor, nn

from unlearn_kernels.surgery import GradientSurgery, rules
from unlearn_kernels.testing import randn


class Net(nn.Module):
    """Two heads, one of which the forget loss never reaches, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.frozen = nn.Linear(6, 9), nn.Linear(9, 9)
        self.head, self.extra = nn.Linear(9, 3), nn.Linear(9, 2, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.frozen(torch.tanh(self.body(x))))
        return self.head(h), self.extra(h)


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


X = [randn(5, 6, seed=s, dtype=torch.float64) for s in range(6)]


def forget_loss(model: nn.Module, x: Tensor) -> Tensor:
    return -model(x)[0].square().mean()


def retain_loss(model: nn.Module, x: Tensor) -> Tensor:
    head, extra = model(x)
    return (head - 1).square().mean() + extra.square().mean()


def flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    ps = [p for p in model.parameters() if p.requires_grad]
    gs = torch.autograd.grad(loss, ps, materialize_grads=True, allow_unused=True)
    return torch.cat([g.flatten() for g in gs]).double()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


def collect(
    surg: GradientSurgery,
    model: nn.Module,
    f: Tensor,
    r: Tensor,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    scale = (lambda loss: loss) if scaler is None else scaler.scale
    with surg.objective("forget"):
        scale(forget_loss(model, f)).backward()
    with surg.objective("retain"):
        scale(retain_loss(model, r)).backward()


RULES: dict[str, dict[str, object]] = {name: {} for name in rules.RULES} | {
    "constant": {"values": [0.5, 2.0]}
}
