"""What an SAE costs, in FLOPs of the products that its training and its index really make.

    C_SAE = 2 · P_ℓ · T + c · visits + indexing

T tokens go through the model up to the hook once; each of them is visited as often as it is trained
on, at c FLOPs a visit. c is counted from `training.step`: where latents are chosen, only the
pre-activations are a dense product, and everything after them touches the pairs that fire.
"""

from collections.abc import Mapping, Sequence

from saesteer.errors import TrainingError
from saesteer.training.architectures import ARCHITECTURES

# As in `training.step`: above this share of pairs a penalised step makes dense products, and
# up to so many dead latents for each that is revived the AuxK loss does.
FEW = 1 / 40
_DENSE_AUX = 16


def step_flops(
    architecture: str,
    *,
    d_in: int,
    d_out: int,
    d_sae: int,
    active: float,
    dead: float = 0.0,
    aux: bool = True,
    skip: bool = False,
) -> float:
    """c: FLOPs of one training step for each token of its batch.

    Forward: pre-activations, and what the pairs decode to. Backward: each pair's product with the
    error, and its part of the decoder's and the encoder's gradient; no gradient of the input is
    made, so that a dense step costs 10 · d · m and not 12. Adam, sums and products of a matrix with
    one vector a batch are left out, and so are the few pre-activations that are made again where
    the product is in bfloat16.

    Args:
        active: latents that fire on a token.
        dead: latents that haven't fired for long, which the AuxK loss revives; aux: whether that
            loss has a weight.
        skip: whether a transcoder has a linear path past its latents.

    Raises:
        TrainingError: no such architecture.
    """
    about = ARCHITECTURES.get(architecture)
    if about is None:
        raise TrainingError(
            f"no architecture {architecture!r} to count the step of: there are "
            f"{', '.join(ARCHITECTURES)}"
        )
    pairs = active
    if not about.chooses and active >= FEW * d_sae:
        pairs = d_sae
    # Gated decodes a second time, by its gate alone, and takes that error's products too.
    decoded = 10 if architecture == "gated" else 6
    flops = 2.0 * d_in * d_sae + pairs * (decoded * d_out + 2 * d_in)
    if skip:
        flops += 4.0 * d_in * d_out
    if aux and about.revives and dead > 0:
        revived = min(max(1, d_out // 2), dead)
        among = dead if dead <= _DENSE_AUX * revived else revived
        flops += 2.0 * d_in * dead + among * (6 * d_out + 2 * d_in)
    return flops


def training_flops(
    metrics: Sequence[Mapping[str, float]],
    architecture: str,
    *,
    d_in: int,
    d_out: int,
    d_sae: int,
    aux: bool = True,
    skip: bool = False,
) -> float:
    """c · visits, over the lines of a run's metrics.jsonl.

    Each line's "l0" and "dead_fraction" stand for the "tokens" since the line before it.

    Raises:
        TrainingError: no lines, or lines without these figures; no such architecture.
    """
    if not metrics:
        raise TrainingError("no logged steps to count the cost of training from: metrics.jsonl")
    total, before = 0.0, 0.0
    for line in metrics:
        missing = {"tokens", "l0", "dead_fraction"} - set(line)
        if missing:
            raise TrainingError(
                f"a line of metrics.jsonl has no {', '.join(sorted(missing))}, from which the cost "
                "of training is counted; expected the lines that `saesteer train` writes"
            )
        each = step_flops(
            architecture,
            d_in=d_in,
            d_out=d_out,
            d_sae=d_sae,
            active=line["l0"],
            dead=line["dead_fraction"] * d_sae,
            aux=aux,
            skip=skip,
        )
        total += each * (line["tokens"] - before)
        before = line["tokens"]
    return total


def indexing_flops(
    *,
    tokens: int,
    d_in: int,
    d_out: int,
    d_sae: int,
    vocabulary: int,
    neighbours: bool = True,
    parameters: int = 0,
) -> float:
    """Encoding the text, the logit lens, and every decoder row against every other.

    Args:
        vocabulary: tokens of the unembedding; 0 where the decoder doesn't write into the stream.
        neighbours: whether the nearest decoder rows were looked for.
        parameters: P_ℓ where the text went through the model for it; 0 where it was cached.
    """
    encoding = 2.0 * (d_in * d_sae + parameters) * tokens
    return encoding + 2.0 * d_out * d_sae * (vocabulary + neighbours * d_sae)


def sae_flops(parameters: int, tokens: int, training: float) -> float:
    """2 · P_ℓ · T + c · visits: what a trained SAE cost, without its index.

    tokens: T, how many activations were cached, or made on the way where they weren't kept.
    """
    return 2.0 * parameters * tokens + training
