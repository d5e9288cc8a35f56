"""How one SAE is trained: what can be chosen, what is usual, and what is refused."""

from dataclasses import dataclass

import torch

from saesteer.errors import TrainingError, did_you_mean
from saesteer.training.architectures import ARCHITECTURES

_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How one SAE is trained.

    Attributes:
        architecture: a name in `ARCHITECTURES`; d_sae: latents; k: latents a token, where the
            architecture chooses them.
        sparsity: weight of the penalty of the others; None: `DEFAULT_SPARSITY`.
        widths: where matryoshka's nested dictionaries end; d_sae is the last; by default
            1/16, 1/8, 1/4, 1/2 and all of it.
        lr: peak learning rate of Adam; by default 2.5 / √(d · d_sae): the fall with d_sae is that
            of Gao et al. 2024, A.3, the factor was the best measured on a 3M model's stream.
        warm_up, decay: shares of the steps in which it rises from 0, and falls to 0 at the end.
        sparsity_warm_up: share of the steps in which the penalty's weight rises from 0.
        seed: of the weights.
        encoder_init: how long the encoder's rows, along the decoder's, are at first: "fitted", so
            that its first code explains most; or "unit", as long as those (Gao et al. 2024).
        b_dec_init: "mean" or "geometric_median" of the training rows.
        aux_coefficient: weight of the AuxK loss for dead latents.
        dead_after: a latent is dead when it fired on none of that many tokens; by default 5% of
            all, 4 batches at least and 10 million at most.
        products: "float32", "bfloat16" or "auto": what large products are made in. Weights, values
            and sums stay float32. Auto takes bfloat16 where the processor has it in hardware. With
            "float64" all of it is float64: slow, and the same on every machine to many digits,
            where the others' rounding grows into another SAE.
        skip: a transcoder also has a linear path past its latents.
    """

    architecture: str = "batchtopk"
    d_sae: int = 2048
    k: int = 16
    sparsity: float | None = None
    widths: tuple[int, ...] = ()
    lr: float | None = None
    warm_up: float = 0.05
    decay: float = 0.2
    sparsity_warm_up: float = 0.1
    seed: int = 0
    encoder_init: str = "fitted"
    b_dec_init: str = "mean"
    aux_coefficient: float = 1 / 32
    dead_after: int | None = None
    products: str = "auto"
    skip: bool = False


DEFAULT_SPARSITY = {"standard": 0.02, "gated": 0.02, "jumprelu": 0.002}


def check_settings(settings: Settings, *, transcoder: bool) -> None:
    """Refuse what nothing could be trained with; TrainingError names it."""
    about = settings
    if about.architecture not in ARCHITECTURES:
        raise TrainingError(
            f"unknown architecture {about.architecture!r}"
            f"{did_you_mean(about.architecture, ARCHITECTURES)}: "
            f"use one of {', '.join(ARCHITECTURES)}"
        )
    if ARCHITECTURES[about.architecture].chooses and not 1 <= about.k <= about.d_sae:
        raise TrainingError(f"k is {about.k}: it must lie between 1 and d_sae = {about.d_sae}")
    if about.encoder_init not in ("fitted", "unit"):
        raise TrainingError(f"encoder_init is {about.encoder_init!r}: use 'fitted' or 'unit'")
    if about.b_dec_init not in ("mean", "geometric_median"):
        raise TrainingError(f"b_dec_init is {about.b_dec_init!r}: use 'mean' or 'geometric_median'")
    if about.products not in ("auto", *_DTYPES):
        raise TrainingError(f"products is {about.products!r}: use 'float32', 'bfloat16' or 'auto'")
    for name, value in (("sparsity", about.sparsity), ("dead_after", about.dead_after)):
        if value is not None and not value >= 0:
            raise TrainingError(f"{name} is {value}: it must be 0 or more")
    for name, share in (
        ("warm_up", about.warm_up), ("decay", about.decay),
        ("sparsity_warm_up", about.sparsity_warm_up),
    ):  # fmt: skip
        if not 0 <= share <= 1:
            raise TrainingError(f"{name} is {share}: it is a share of the steps, from 0 to 1")
    widths = about.widths
    if widths and (
        list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != about.d_sae
    ):
        raise TrainingError(
            f"widths are {list(widths)}: they must rise, and end at d_sae = {about.d_sae}"
        )
    if transcoder and about.architecture in ("topk", "gated"):
        raise TrainingError(
            f"sae-lens's format can't hold a {about.architecture} transcoder; use batchtopk, "
            "matryoshka, jumprelu or standard"
        )
    if about.skip and not transcoder:
        raise TrainingError("only a transcoder can have a skip; set sae.hook_point_out")


def product_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `Settings.products` names; auto asks the hardware."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # torch has no public name for this.
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and asked() else torch.float32
