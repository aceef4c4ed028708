"""AdamW over the trained parameters of a process, with its schedule and gradient clipping.

Gradients arrive as those of a summed loss. A step divides them by the step's target tokens (`scale`) and clips them
by a factor that may have been computed from other processes' norms too (`clip_coefficient`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fedsea.errors import ConfigError, NonFiniteError
from fedsea.plan import OptimizerSection

_PREFIX = "optimizer."
_STATE = ("exp_avg", "exp_avg_sq", "step")
_CHUNK = 1 << 22
"""Values that are squared in float64 at a time: a whole embedding's gradient would need twice its memory again."""


def clip_coefficient(squared_norm: float, max_norm: float) -> float:
    """Factor that brings gradients of this squared norm to at most `max_norm`; as in `torch.nn.utils.clip_grad_norm_`.

    Args:
        squared_norm: Of all gradients that are clipped together.
        max_norm: Largest norm; 0 switches clipping off.

    >>> clip_coefficient(0.25, max_norm=1.0), clip_coefficient(100.0, max_norm=0.0)
    (1.0, 1.0)
    """
    return min(1.0, max_norm / (math.sqrt(squared_norm) + 1e-6)) if max_norm > 0 else 1.0


class SegmentOptimizer:
    """AdamW with the plan's settings; without any parameters, every method does nothing.

    Args:
        parameters: Trained parameters by portable name; decay acts on all of them.
        settings: The plan's.
        num_steps: Steps of the whole run, for the schedule.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimizerSection, num_steps: int) -> None:
        self.parameters = dict(parameters)
        self.settings = settings
        self.num_steps = num_steps
        # One pass over each parameter; on other devices this would keep the counters there, too.
        fused = all(parameter.device.type == "cpu" for parameter in self.parameters.values())
        self._adamw = (
            torch.optim.AdamW(
                self.parameters.values(),
                lr=settings.learning_rate,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                fused=fused,
                foreach=not fused,
            )
            if self.parameters
            else None
        )

    def learning_rate(self, step: int) -> float:
        """Rate of a step (counted from 0): linear warm-up from 0, then constant, or down to 0 at `num_steps`.

        The same values as `transformers.get_scheduler` gives.
        """
        peak, warmup = self.settings.learning_rate, self.settings.warmup_steps
        if step < warmup:
            return peak * (step / warmup)
        if self.settings.schedule == "constant":
            return peak
        if step >= self.num_steps:
            return 0.0
        progress = (step - warmup) / (self.num_steps - warmup)
        return peak * (
            1.0 - progress if self.settings.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * progress)
        )

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters by name; `adapters.read` looks for them in the whole model first."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def squared_norm(self, scale: float) -> float:
        """Squared norm of the gradients times `scale`, summed in float64.

        Raises:
            NonFiniteError: Names the parameters whose gradient is not finite.
        """
        with_gradient = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not with_gradient:
            return 0.0
        # One transfer for all of them: on an accelerator every read of a value waits for the device.
        squares = torch.stack([_square_sum(gradient) for gradient in with_gradient.values()]).tolist()
        bad = [name for name, square in zip(with_gradient, squares, strict=True) if not math.isfinite(square)]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise NonFiniteError(
                f"The gradient of {', '.join(bad[:3])}{more} is not finite; the step was not applied. Lower "
                "optimizer.learning_rate, or use a wider model.dtype or wire codec."
            )
        return math.fsum(squares) * scale * scale

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the summed loss by name, not copied; zeros where a parameter has received none."""
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in self.parameters.items()}

    def set_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Replace all gradients.

        Raises:
            ConfigError: Names or shapes are not those of the parameters.
        """
        self._check_names(gradients.keys(), self.parameters.keys(), "gradients")
        for name, parameter in self.parameters.items():
            if gradients[name].shape != parameter.shape:
                found, expected = tuple(gradients[name].shape), tuple(parameter.shape)
                raise ConfigError(f"The gradient of {name} has shape {found} instead of {expected}.")
        for name, parameter in self.parameters.items():
            parameter.grad = _copied_like(parameter, gradients[name])

    def step(self, step: int, scale: float, clip_coefficient: float) -> None:
        """Apply the gradients times `scale` times `clip_coefficient`, at the rate of `step`; they are consumed.

        Parameters without a gradient stay as they are, like in torch.
        """
        if self._adamw is None:
            return
        found = [p.grad for p in self.parameters.values() if p.grad is not None]
        if found and scale * clip_coefficient != 1.0:
            torch._foreach_mul_(found, scale * clip_coefficient)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self._adamw.step()
        self.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that an exact resume needs, by name, not copied: `optimizer.<parameter>.exp_avg` and so on."""
        if self._adamw is None:
            return {}
        return {
            f"{_PREFIX}{name}.{key}": self._adamw.state[parameter][key]
            for name, parameter in self.parameters.items()
            if parameter in self._adamw.state
            for key in _STATE
        }

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave; entries of other names than `optimizer.…` are passed over.

        Raises:
            ConfigError: The state is not that of these parameters.
        """
        state = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
        known = {f"{_PREFIX}{name}.{key}" for name in self.parameters for key in _STATE}
        present = {name for name in self.parameters if f"{_PREFIX}{name}.exp_avg" in state}
        self._check_names(state.keys(), known & state.keys(), "optimizer state")
        self._check_names(state.keys(), {f"{_PREFIX}{n}.{key}" for n in present for key in _STATE}, "optimizer state")
        for name in present:
            for key in ("exp_avg", "exp_avg_sq"):
                if state[f"{_PREFIX}{name}.{key}"].shape != self.parameters[name].shape:
                    raise ConfigError(f"The optimizer state of {name} has another shape than the parameter.")
        if self._adamw is None:
            return
        self._adamw.state.clear()
        for name in present:
            parameter = self.parameters[name]
            moments = {
                key: _copied_like(parameter, state[f"{_PREFIX}{name}.{key}"]) for key in ("exp_avg", "exp_avg_sq")
            }
            # torch keeps the counter as a float32 on the CPU, whatever the parameter's device.
            counter = state[f"{_PREFIX}{name}.step"].to("cpu", torch.float32, copy=True)
            self._adamw.state[parameter] = {"step": counter, **moments}

    @staticmethod
    def _check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
        differing = sorted(set(found) ^ set(expected))
        if differing:
            raise ConfigError(
                f"The {what} and the trained parameters do not fit together at {differing[0][:200]!r}: both need the "
                "same plan, base model and version of fedsea."
            )


def _copied_like(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy that lies in memory as the parameter does: torch's fused AdamW walks through both alike."""
    return torch.empty_like(parameter).copy_(values)


def _square_sum(gradient: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=gradient.device)
    for chunk in torch.split(gradient.detach().reshape(-1), _CHUNK):
        wide = chunk.to(torch.float64)
        total += torch.dot(wide, wide)
    return total
