"""Every method that makes a direction, a map or a reader: its name, its file, its paper.

A method is one module with one function `fit`; adding one adds a file and a line here. What `fit`
takes and gives depends on the kind:

    pairs        (chosen [n, d], rejected [n, d], *, seed, …) -> Tensor [d]
    pairs-many   the same -> list[Tensor [d]]
    map          the same -> (matrix [d, d], shift [d])
    reader       the same -> a value with score(x [m, d]) -> [m]; it never becomes an edit
    model        (model, tokenizer, pairs | prompts, points, *, seed, …) -> list[Direction]
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from saesteer.errors import ConfigError, did_you_mean

Kind = Literal["pairs", "pairs-many", "map", "reader", "model"]


@dataclass(frozen=True)
class Method:
    """name: what it is called. module: its file in saesteer/directions. line: what it does, in one
    line. paper: where it comes from."""

    name: str
    module: str
    kind: Kind
    line: str
    paper: str

    @property
    def fit(self) -> Callable[..., Any]:
        """Its function; the module is imported now, not before."""
        return importlib.import_module(f"saesteer.directions.{self.module}").fit


_ALL = (
    Method(
        "mean-difference",
        "mean_difference",
        "pairs",
        "mean over pairs of chosen − rejected (CAA); the one to beat",
        "Panickssery et al. 2024, arXiv 2312.06681",
    ),
    Method(
        "mean-difference-unpaired",
        "mean_difference_unpaired",
        "pairs",
        "mean of one class minus mean of the other, for sides that aren't pairs",
        "Marks & Tegmark 2023, arXiv 2310.06824",
    ),
    Method(
        "pca-activations",
        "pca_activations",
        "pairs-many",
        "principal directions of the activations, without labels; + and − of each",
        "Zou et al. 2023, arXiv 2310.01405",
    ),
    Method(
        "lat",
        "lat",
        "pairs",
        "first principal direction of the pairs' differences, uncentred; sign from labels",
        "Zou et al. 2023, arXiv 2310.01405",
    ),
    Method(
        "logistic-probe",
        "logistic_probe",
        "pairs",
        "weights of a logistic probe; reads well, steers badly",
        "Alain & Bengio 2016, arXiv 1610.01644",
    ),
    Method(
        "ccs",
        "ccs",
        "reader",
        "contrast-consistent search: reads without labels, never steers",
        "Burns et al. 2022, arXiv 2212.03827",
    ),
    Method(
        "leace",
        "leace",
        "map",
        "erase what linear probes can read of the contrast; add=.5 then shifts",
        "Belrose et al. 2023, arXiv 2306.03819",
    ),
    Method(
        "mimic",
        "mimic",
        "map",
        "move the rejected side's mean and covariance onto the chosen side's",
        "Singh et al. 2024, arXiv 2402.09631",
    ),
    Method(
        "act-add",
        "act_add",
        "model",
        "difference of one pair's prompts, token by token, added to the prompt alone",
        "Turner et al. 2023, arXiv 2308.10248",
    ),
    Method(
        "iti",
        "iti",
        "model",
        "shift the attention heads whose probes read best (inference-time intervention)",
        "Li et al. 2023, arXiv 2306.03341",
    ),
    Method(
        "icv",
        "icv",
        "model",
        "in-context vector: PC1 of last-token differences at all layers, norm kept",
        "Liu et al. 2023, arXiv 2311.06668",
    ),
    Method(
        "function-vector",
        "function_vector",
        "model",
        "sum of the mean outputs of the heads that carry a task",
        "Todd et al. 2024, arXiv 2310.15213",
    ),
    Method(
        "refusal-projection",
        "refusal",
        "model",
        "set the projection on the mean difference to the chosen side's average",
        "Marshall et al. 2024, arXiv 2411.09003",
    ),
    Method(
        "ablate",
        "ablate",
        "model",
        "take the mean difference out wherever the model writes to its stream",
        "Arditi et al. 2024, arXiv 2406.11717",
    ),
    Method(
        "melbo",
        "melbo",
        "model",
        "directions that change later layers most, found without labels",
        "Mack & Turner 2024, Mechanistically eliciting latent behaviors in language models",
    ),
    Method(
        "bias-only",
        "bias_only",
        "model",
        "one vector trained by gradient, like BiPO but without reference model and signs",
        "Cao et al. 2024, arXiv 2406.00045",
    ),
    Method(
        "random",
        "random_control",
        "pairs",
        "control: a random direction as long as the mean difference",
        "a control",
    ),
    Method(
        "shuffled-labels",
        "shuffled",
        "pairs",
        "control: the mean difference after half of the pairs swapped sides",
        "a control",
    ),
)

ALTERNATIVES = ("pca-activations", "melbo")
"""Methods without labels: their directions are alternatives, to be used one at a time; what any
other method gives (a head each, a layer each) belongs together."""

METHODS: dict[str, Method] = {method.name: method for method in _ALL}


ALIASES = {"affine": "mimic", "orthogonalise": "ablate"}
"""Other names of methods. `ablate` takes out at run time what orthogonalised weights can't write;
`saesteer steer --bake` writes such weights."""


def method(name: str) -> Method:
    """The method of that name, or of another name that it has.

    Raises:
        ConfigError: there is none.
    """
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ConfigError(
            f"no method {name!r}{did_you_mean(name, [*METHODS, *ALIASES])}; the methods are "
            f"{', '.join(METHODS)}"
        )
    return METHODS[name]
