"""AdamW that does the surgery on the way: no combined gradient is ever in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery_adamw as reference
from unlearn_kernels.surgery import _lists
from unlearn_kernels.surgery.conflict import Conflict
from unlearn_kernels.surgery.gramian import gramian
from unlearn_kernels.surgery.rules import make_rule

Gradients = Sequence[Tensor | None] | Mapping[Tensor, Tensor | None]
_NAMES: Final = ("params", "exp_avg", "exp_avg_sq", "forget", "retain")
# What torch.optim.AdamW keeps in its groups too, so that state goes either way. Fused: steps lie on the device.
_SHARED: Final = {
    "amsgrad": False, "foreach": None, "capturable": False, "differentiable": False, "fused": True,
    "decoupled_weight_decay": True,
}  # fmt: skip


def _triton(*arguments: Any) -> None:
    from unlearn_kernels.triton_kernels.surgery import adamw as kernels

    kernels.surgical_adamw_(*arguments)


_ops.register_operator(
    "surgical_adamw",
    "surgery",
    "AdamW step on sum_k w_k g_k over lists of tensors",
    reference=reference.surgical_adamw_,
    fake=None,
    triton=_triton,
    cuda=_ops.launcher("surgery", "surgical_adamw_", "cuda_kernels"),
    op="surgical_adamw_",
)


class SurgicalAdamW(torch.optim.Optimizer):
    r"""AdamW whose gradient is the surgery of two, `g = w_f f + w_r r`, made while the step reads them.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
              \theta \leftarrow (1 - \eta\lambda)\,\theta
              - \frac{\eta}{1 - \beta_1^t} \, \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    One pass reads both gradients for their Gramian, from which the rule makes the weights; one reads them again
    beside parameter and moments and writes these. That is 10 streams of memory where `project_conflict_` and
    `torch.optim.AdamW(fused=True)` take 12. The combined gradient is in float32 (float64 for such
    parameters), also where the gradients are bfloat16, which could not hold a small correction. The numbers
    are those of `combine_` into float32 and AdamW, to the rounding of float32.

    Args:
        params: as of every torch optimizer: parameters or groups of them, of float32, float64, bfloat16 or
            float16. Groups may differ in all of the following five.
        lr, betas, eps, weight_decay, maximize: as of `torch.optim.AdamW`; `lr` may be a tensor of one element.
        rule: a name of `surgery.rules.RULES`, such a rule, or any function from the Gramian (2, 2) float64 of
            (forget, retain) to their weights (2,), on its device, so that nothing waits.
        moments: the dtype of `exp_avg` and `exp_avg_sq`; by default the parameter's, as torch has it.
        stochastic_rounding: bfloat16 parameters are rounded up or down at random, so that updates below
            their resolution are right on average. Philox4x32-10, keyed by `seed`, with the step and the place of
            the parameter in the list: a run can be repeated.
        seed: at least 0.
        amsgrad: not supported.
        backend: see `unlearn_kernels.use_backend`.

    Attributes:
        conflict: the `Conflict` of the last step: Gramian and weights, before the gradient scale is divided out.

    A step in which a weight or `|f|` or `|r|` is not finite is skipped as a whole, `step` of the state included,
    decided on the device. Parameters without a gradient take no part; for a rule that changes the forget gradient
    alone (`agem`, `gru`), neither do those without a forget gradient. `state_dict` is that of
    `torch.optim.AdamW`, and either loads the other's. Under `torch.amp.GradScaler` both gradients carry its scale.

    Raises:
        ValueError: for a hyperparameter out of range, `amsgrad`, an unknown rule, or gradients that do not fit.

    Scratch: 24 bytes for every 16384 elements and 48 KB a thread.

    Sources: AdamW, Loshchilov and Hutter 2019 (arXiv 1711.05101); A-GEM, Chaudhry et al. 2019 (arXiv 1812.00420).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        rule: str | Callable[[Tensor], Tensor] = "agem",
        moments: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        amsgrad: bool = False,
        backend: Backend | None = None,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad is not supported by SurgicalAdamW, got True")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.rule = make_rule(rule) if isinstance(rule, str) else rule
        self.moments, self.stochastic_rounding, self.seed = moments, stochastic_rounding, seed
        self.backend = backend
        self.conflict: Conflict | None = None
        self._retain: list[Tensor | None] | None = None
        self._step_supports_amp_scaling = True
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**defaults, **_SHARED})
        for group in self.param_groups:
            _check_group(group)

    def take_retain(self, gradients: Gradients | None = None) -> None:
        """Keeps the retain gradients for the next step: by default every `.grad`, which becomes None."""
        params = self._params()
        if gradients is not None:
            self._retain = _listed("gradients", gradients, params)
            return
        self._retain = [p.grad for p in params]
        for p in params:
            p.grad = None

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        forget: Gradients | None = None,
        retain: Gradients | None = None,
        weights: Tensor | Sequence[float] | None = None,
    ) -> Any:
        """One step.

        Args:
            closure: evaluated first, with gradients enabled.
            forget: a gradient or None for each parameter, in their order over the groups or by parameter; by
                default every `.grad`.
            retain: likewise; by default what `take_retain` has kept. None counts as zero.
            weights: of forget and retain, instead of the rule's. No Gramian is taken then, and of the gradients
                nothing is checked.

        Returns:
            What the closure returned, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._params()
        fs = [p.grad for p in params] if forget is None else _listed("forget", forget, params)
        rs = self._retain if retain is None else _listed("retain", retain, params)
        if rs is None:
            raise ValueError("retain must be given, here or to take_retain, got None")
        self._retain = None
        one_sided = weights is None and getattr(self.rule, "one_sided", False)
        pairs = list(zip(fs, rs, strict=True))
        places = [i for i, (f, r) in enumerate(pairs) if f is not None or not (one_sided or r is None)]
        if places:
            given, kept = ([_or_zeros(pairs[i][side], params[i]) for i in places] for side in (0, 1))
            self._apply([params[i] for i in places], given, kept, places, weights)
        return loss

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _apply(
        self,
        params: list[Tensor],
        forget: list[Tensor],
        retain: list[Tensor],
        places: list[int],
        weights: Tensor | Sequence[float] | None,
    ) -> None:
        states = [self._state_of(p) for p in params]
        moments = [[s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]]
        lists = [params, *moments, forget, retain]
        call = _lists.kernel("surgical_adamw", self.backend, _NAMES, lists, places)
        w = self._weights(forget, retain, weights)
        of_all = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        arguments = (
            params, *moments, [s["step"] for s in states], [*forget, *retain], w, self._groups(w.device),
            [of_all[place] for place in places], self.stochastic_rounding, self.seed,
        )  # fmt: skip
        rest = [x for tensors in lists[1:] for x in tensors]
        _lists.written(_NAMES, params, rest, lambda: call(*arguments), places)

    def _weights(
        self, forget: list[Tensor], retain: list[Tensor], given: Tensor | Sequence[float] | None
    ) -> Tensor:
        """(2,) float64 of this step; NaN, which skips it, where a gradient is not finite."""
        if given is not None:
            w = torch.as_tensor(given, dtype=torch.float64, device=forget[0].device)
            if w.shape != (2,):
                raise ValueError(
                    f"weights must be those of forget and retain, shape (2,), got {tuple(w.shape)}"
                )
        else:
            G = gramian([forget, retain], backend=self.backend)
            w = self.rule(G).double()
            self.conflict = Conflict(G, w, w[:0])
            w = torch.where(G.diagonal().isfinite().all(), w, torch.nan)
        scale = getattr(self, "grad_scale", None)
        return (w if scale is None else w / scale.to(w)).contiguous()

    def _groups(self, device: torch.device) -> Tensor:
        """(groups, 6) float64: lr, both betas, eps, weight decay, sign."""
        rows = [
            (
                0.0 if isinstance(g["lr"], Tensor) else g["lr"],
                *g["betas"],
                g["eps"],
                g["weight_decay"],
                -1 if g["maximize"] else 1,
            )
            for g in self.param_groups
        ]
        made = torch.tensor(rows, dtype=torch.float64).to(device, non_blocking=True)
        for i, group in enumerate(self.param_groups):
            if isinstance(group["lr"], Tensor):
                made[i, 0] = group["lr"].squeeze()
        return made

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, dtype=self.moments)
        return cast(dict[str, Tensor], state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a SurgicalAdamW or of `torch.optim.AdamW`.

        Raises:
            ValueError: if that has `amsgrad`.
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("state_dict has amsgrad, which SurgicalAdamW does not support")
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.update(_SHARED)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, self._params(), strict=True):
            saved, state = state_dict["state"].get(i, {}), self.state[p]
            if "step" in state:
                step = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
                state["step"] = step.clone()
            for name in ("exp_avg", "exp_avg_sq"):
                if name in saved:  # torch has cast it to the parameter's dtype
                    state[name] = saved[name].to(p.device, self.moments or p.dtype, copy=True)


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Zeros, which take no memory, for a gradient that is None."""
    return like.new_zeros(()).expand_as(like) if gradient is None else gradient


def _listed(name: str, gradients: Gradients, params: Sequence[Tensor]) -> list[Tensor | None]:
    if isinstance(gradients, Mapping):
        return [gradients.get(p) for p in params]
    if len(gradients) != len(params):
        raise ValueError(f"{name} must have one entry a parameter, {len(params)}, got {len(gradients)}")
    return list(gradients)


def _check_group(group: Mapping[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
    elif not lr >= 0:
        raise ValueError(f"lr must be at least 0, got {lr}")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be at least 0 and less than 1, got {tuple(group['betas'])}")
