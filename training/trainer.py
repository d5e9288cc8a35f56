"""One SAE in training: its weights, its optimiser, and the SAE that comes out."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.core.sae import Conventions, Sae
from saesteer.errors import TrainingError
from saesteer.training.architectures import ARCHITECTURES, Weights
from saesteer.training.choose import Encoder, calibrated_threshold
from saesteer.training.ranks import ALONE, Ranks
from saesteer.training.settings import (
    DEFAULT_SPARSITY,
    Settings,
    check_settings,
    product_dtype,
)
from saesteer.training.step import Plan, Step, encoder_of, loss_and_gradients
from saesteer.training.stream import Batch, Stream

# Rows on which a threshold is calibrated, and on which densities are counted.
_CALIBRATION = 2**17
# Decoder rows that are looked at together.
_ROWS = 1024
# Rows to which the encoder's first size is fitted.
_FITTED = 2048
# A loss this many times the variance never comes back.
EXPLODED = 1e4


class Scales(NamedTuple):
    """What input and target are multiplied by, so that their mean norm is √d."""

    x: float
    target: float


class Trainer:
    """Weights that learn from batches.

    Args:
        settings: checked with `check_settings`.
        stream: what it is going to be trained on; statistics come from its sample.
        steps: how many steps there will be, which the schedules depend on.
        identity: the arguments of `Sae` that say where it belongs (hook_point, hook_point_out,
            model_id, model_fingerprint, prepend_bos, context_size, notes).
        ranks: the processes that train it together; by_features: each holds a slice of d_sae and
            sees every row, instead of all of d_sae and a share of the rows.

    Raises:
        TrainingError: bad settings; activations that are not finite, or all zero.
    """

    def __init__(
        self, settings: Settings, stream: Stream, *, steps: int, identity: Mapping[str, Any],
        ranks: Ranks = ALONE, by_features: bool = False, device: str | torch.device = "cpu",
    ):  # fmt: skip
        transcoder = identity.get("hook_point_out") is not None
        check_settings(settings, transcoder=transcoder)
        if by_features and settings.d_sae % ranks.size:
            raise TrainingError(
                f"{ranks.size} processes can't share {settings.d_sae} features evenly; use a "
                "d_sae that is a multiple of their number"
            )
        self.settings, self.identity, self.steps = settings, dict(identity), steps
        self._stream, self.device = stream, torch.device(device)
        self._dtype = torch.float64 if settings.products == "float64" else torch.float32
        x, target = (each.to(self.device, self._dtype) for each in stream.sample)
        for each in (x, target):
            check_finite(each, "before the first step")
        d_in = x.shape[1]
        self.scales = Scales(_scale(x), _scale(target))
        x, target = x * self.scales.x, target * self.scales.target
        variance = max(float((target - target.mean(0)).square().sum(-1).mean()), 1e-12)
        architecture = ARCHITECTURES[settings.architecture]
        d_sae = settings.d_sae
        widths: tuple[int, ...] = (d_sae,)
        if architecture.nested:
            widths = settings.widths or tuple(max(1, d_sae // 2**n) for n in (4, 3, 2, 1, 0))
            widths = tuple(sorted(set(widths)))
        # The bandwidth is a part of an activation's size, which grows with the norm √d.
        self.plan = Plan(
            architecture, stream.batch_size, variance, settings.k, widths,
            bandwidth=0.05 * math.sqrt(d_in),
            aux_coefficient=settings.aux_coefficient,
            subtract_b_dec=not transcoder,
            dtype=product_dtype(settings.products, self.device),
            ranks=ranks, by_features=by_features,
            first_latent=_slice(d_sae, ranks).start if by_features else 0,
        )  # fmt: skip
        self.lr = 2.5 / math.sqrt(d_in * d_sae) if settings.lr is None else settings.lr
        usual = DEFAULT_SPARSITY.get(settings.architecture, 0.0)
        self.sparsity = usual if settings.sparsity is None else settings.sparsity
        usual_wait = max(4 * stream.batch_size, min(10_000_000, steps * stream.batch_size // 20))
        self.dead_after = usual_wait if settings.dead_after is None else settings.dead_after
        self.weights = self._initial(x, target)
        n = len(self.weights["b_enc"])
        self.last_fired = torch.zeros(n, dtype=torch.long, device=self.device)
        self._optimiser = torch.optim.Adam(list(self.weights.values()), lr=self.lr, fused=True)
        self.done = 0

    def _initial(self, x: Tensor, target: Tensor) -> Weights:
        """Random unit decoder rows, the encoder along them, b_dec at the middle of the target."""
        about, architecture = self.settings, self.plan.architecture
        generator = torch.Generator().manual_seed(about.seed)

        def directions(width: int) -> Tensor:
            rows = torch.randn(about.d_sae, width, generator=generator)
            return F.normalize(rows.to(self._dtype), dim=1)

        decoder = directions(target.shape[1])
        encoder = decoder.clone() if self.plan.subtract_b_dec else directions(x.shape[1])
        middle = target.mean(0) if about.b_dec_init == "mean" else _geometric_median(target)
        weights = {
            "encoder": encoder.to(self.device),
            "b_enc": torch.zeros(about.d_sae, device=self.device, dtype=self._dtype),
            "decoder": decoder.to(self.device),
            "b_dec": middle,
        }
        if not self.plan.subtract_b_dec:
            weights["b_enc"] -= weights["encoder"] @ x.mean(0)
        for name, value in architecture.extra:
            weights[name] = torch.full_like(weights["b_enc"], value)
        if about.skip:
            weights["skip"] = target.new_zeros(target.shape[1], x.shape[1])
        if about.encoder_init == "fitted":
            factor = _fitted_factor(self.plan, weights, x[:_FITTED], target[:_FITTED])
            weights["encoder"] *= factor
            weights["b_enc"] *= factor
        if self.plan.by_features:
            mine = _slice(about.d_sae, self.plan.ranks)
            weights = {
                name: tensor if name in ("b_dec", "skip") else tensor[mine].clone()
                for name, tensor in weights.items()
            }
        return weights

    def step(self, batch: Batch) -> dict[str, float]:
        """Learn from this rank's rows of the next step; return the step's figures.

        Raises:
            TrainingError: the loss is NaN, infinite or exploding, or the activations aren't finite.
        """
        x, target = batch.x.to(self.device, self._dtype) * self.scales.x, batch.target
        if target is batch.x:
            target = x
        else:
            target = target.to(self.device, self._dtype) * self.scales.target
        lr = self.lr * _rise_and_fall(self.done, self.steps, self.settings)
        warm = max(1.0, self.settings.sparsity_warm_up * self.steps)
        seen = self.done * self._stream.batch_size
        dead = (seen - self.last_fired >= self.dead_after).nonzero()[:, 0]
        result = loss_and_gradients(
            self.plan, self.weights, x, target,
            sparsity=self.sparsity * min(1.0, (self.done + 1) / warm), dead=dead,
        )  # fmt: skip
        figures = self._figures(result, dead)
        loss = figures["loss"]
        if not loss < EXPLODED:
            check_finite(x, f"in the batch of step {self.done + 1}")
            raise TrainingError(
                f"the loss is {loss:.4g} of the variance at step {self.done + 1} of {self.steps}: "
                f"training has diverged; try a lower learning rate than {self.lr:.3g} or a longer "
                "warm-up"
            )
        self._update(result.gradients, lr)
        self.done += 1
        self.last_fired[result.fired] = seen + self._stream.batch_size
        return figures | {"lr": lr}

    def _update(self, gradients: Weights, lr: float) -> None:
        """One Adam step; decoder rows have norm 1 before and after it.

        Where latents are chosen, a row that has grown gives its growth to the encoder, which leaves
        what the SAE computes as it is: the step is that of an SAE whose decoder is free and whose
        choice weighs activations by decoder norms. A penalty would be evaded that way, so where
        there is one, rows stay on the sphere.
        """
        decoder = self.weights["decoder"]
        if not self.plan.architecture.chooses:
            # A few rows at a time, so that what is made in between stays in the processor's cache.
            pieces = zip(decoder.split(_ROWS), gradients["decoder"].split(_ROWS), strict=True)
            for rows, grads in pieces:
                grads.addcmul_((grads * rows).sum(-1, keepdim=True), rows, value=-1)
        for name, tensor in self.weights.items():
            tensor.grad = gradients[name]
        self._optimiser.param_groups[0]["lr"] = lr
        self._optimiser.step()
        norms = torch.linalg.vector_norm(decoder, dim=-1).clamp_min_(1e-12)
        decoder.div_(norms[:, None])
        if self.plan.architecture.chooses:
            self.weights["encoder"].mul_(norms[:, None])
            self.weights["b_enc"].mul_(norms)
        if "threshold" in self.weights:
            self.weights["threshold"].clamp_min_(0)

    def _figures(self, result: Step, dead: Tensor) -> dict[str, float]:
        n_dead = torch.tensor(float(len(dead)), device=self.device)
        parts = {
            "loss": result.loss,
            "fvu": result.fvu,
            "penalty": result.penalty,
            "aux": result.aux,
            "l0": result.l0,
            "dead_fraction": self.plan.latent_ranks.sum_(n_dead) / self.settings.d_sae,
        }
        # One transfer: a GPU is waited for once.
        values = torch.stack(list(parts.values())).tolist()
        return {**dict(zip(parts, values, strict=True)), "ev": 1 - values[1]}

    def state(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs, by name."""
        state = {"last_fired": self.last_fired, **self.weights}
        for name, tensor in self.weights.items():
            moments = self._optimiser.state[tensor]
            state |= {f"{name}.{key}": value for key, value in moments.items()}
        return state

    def restore(self, state: Mapping[str, Tensor], done: int) -> None:
        """Go on from a `state` after `done` steps."""
        self.done = done
        self.last_fired.copy_(state["last_fired"])
        for name, tensor in self.weights.items():
            tensor.copy_(state[name])
            self._optimiser.state[tensor] = {
                key: state[f"{name}.{key}"].to(tensor.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def finished(self) -> Sae:
        """The SAE, taking raw activations: scales are folded into its weights.

        With s and t the scales of input and target, t⁻¹ · code(s·x) is what the same encoder makes
        of x with biases and threshold divided by t. A batch's choice of k on average becomes a
        threshold, calibrated on held-out rows.

        Raises:
            TrainingError: the weights are not finite.
        """
        weights = dict(self.weights)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
            raise TrainingError("the weights are not finite after the last step; lower the rate")
        if self.plan.architecture.chooses == "batch":
            threshold = calibrated_threshold(
                self._held_out, self.settings.k, self.plan.latent_ranks
            )
            weights["threshold"] = torch.full_like(weights["b_enc"], threshold)
        if self.plan.by_features:
            weights = {
                name: tensor
                if name in ("b_dec", "skip")
                else torch.cat(self.plan.ranks.gather(tensor))
                for name, tensor in weights.items()
            }
        s, t = self.scales
        folded = {
            name: (tensor if name in ("decoder", "r_mag") else tensor / t).float().cpu()
            for name, tensor in weights.items()
        }
        architecture = self.plan.architecture.saved_as
        parts: dict[str, Any] = {
            "W_enc": (folded["encoder"] * s).T.contiguous(),
            "b_enc": folded["b_enc"],
            "W_dec": folded["decoder"],
            "b_dec": folded["b_dec"],
            "architecture": architecture,
            "k": self.settings.k if architecture == "topk" else None,
        }
        parts |= {name: folded[name] for name in ("threshold", "r_mag", "b_mag") if name in folded}
        if "skip" in folded:
            parts["W_skip"] = folded["skip"] * s
        conventions = Conventions(apply_b_dec_to_input=self.plan.subtract_b_dec)
        return Sae(**parts, conventions=conventions, **self.identity)

    def _held_out(self) -> Iterator[Encoder]:
        plan = self.plan
        for x in self._stream.held_out(_CALIBRATION):
            y = x.to(self.device, self._dtype) * self.scales.x
            yield encoder_of(plan, self.weights, y)._replace(dtype=self._dtype)


def check_finite(x: Tensor, where: str) -> None:
    """Raise TrainingError where activations [n, d] hold NaN or infinity."""
    bad = int((~torch.isfinite(x)).any(-1).sum())
    if bad:
        raise TrainingError(
            f"{bad} of {len(x)} activations {where} hold NaN or infinity; cache them again in "
            "float32 or bfloat16 (float16 overflows at 65504)"
        )


def _scale(x: Tensor) -> float:
    mean_norm = float(x.norm(dim=-1).mean())
    if not mean_norm > 0:
        raise TrainingError("every activation is zero; check the hook point and the cache")
    return x.shape[1] ** 0.5 / mean_norm


def _fitted_factor(plan: Plan, weights: Weights, x: Tensor, target: Tensor) -> float:
    """What the encoder is to be multiplied by for the least squared error, by its first code."""
    along = squared = 0.0
    for first, pre in encoder_of(plan, weights, x).pieces():
        if plan.architecture.chooses:
            values, at = pre.topk(plan.k, dim=-1)
            pre = torch.zeros_like(pre).scatter_(1, at, values)
        made = pre.relu() @ weights["decoder"]
        wanted = target[first : first + len(pre)] - weights["b_dec"]
        along += float((made * wanted).sum())
        squared += float(made.square().sum())
    return along / squared if along > 0 else 1.0


def _slice(d_sae: int, ranks: Ranks) -> slice:
    """The latents that a rank holds where they are shared out."""
    return slice(d_sae * ranks.rank // ranks.size, d_sae * (ranks.rank + 1) // ranks.size)


def _rise_and_fall(step: int, steps: int, settings: Settings) -> float:
    """The learning rate's part of its peak at a step (0-based): rise, plateau, fall to 0."""
    warm = int(settings.warm_up * steps)
    rise = min(1.0, (step + 1) / (warm + 1))
    fall = min(1.0, (steps - step) / (settings.decay * steps)) if settings.decay > 0 else 1.0
    return min(rise, fall)


def _geometric_median(y: Tensor, rounds: int = 50) -> Tensor:
    """The point with the smallest mean distance to y [n, d], by Weiszfeld's iteration."""
    middle = y.mean(0)
    for _ in range(rounds):
        pull = 1 / (y - middle).norm(dim=-1).clamp_min(1e-8)
        middle = (pull[:, None] * y).sum(0) / pull.sum()
    return middle
