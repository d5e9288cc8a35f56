"""attribute: which parts of the model, and which features, matter for a contrast."""

import json
from typing import Annotated

import tyro

from saesteer.cli.arguments import RunFolder
from saesteer.errors import ConfigError
from saesteer.run import Run


def attribute(
    run: RunFolder,
    *,
    pairs: str,
    features: bool = False,
    nodes: str = "blocks,heads,mlps",
    check: bool = False,
    limit: int = 20,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Rank hook points and features by how much they matter for a contrast, by attribution
    patching: what becomes of log p(chosen) − log p(rejected) where one of them is replaced.

    Args:
        run: The run folder.
        pairs: A file of pairs, or a `datasets` name. Where each also has a "corrupt" prompt of as
            many tokens, which asks for the other answer, a node is replaced by what it holds
            there, else by its mean.
        features: Rank the features of the run's SAE too.
        nodes: Which hook points: some of blocks, heads and mlps, or none.
        check: Also replace each node and listed feature, and say how far the two agree.
        limit: At most so many features, and so many nodes in the table.
        batch_size: Pairs a pass.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
        json_: Print one JSON object.
    """
    kinds = [kind.strip() for kind in nodes.split(",") if kind.strip()]
    if kinds == ["none"]:
        kinds = []
    if not kinds and not features:
        raise ConfigError("nothing to rank: give --nodes blocks,heads,mlps or --features")
    if limit < 1:
        raise ConfigError(f"--limit {limit}; expected 1 or more")
    opened = Run.open(run, device=device, dtype=dtype)
    from saesteer.effects import attribution, attribution_view, patching
    from saesteer.effects.contrast import read_contrasts
    from saesteer.effects.nodes import model_nodes

    contrasts, corrupt = read_contrasts(pairs, opened.tokenizer)
    sae = opened.sae if features else None
    found = attribution.attribute(
        opened.model,
        opened.tokenizer,
        contrasts,
        model_nodes(opened.model, kinds),
        sae=sae,
        corrupt=corrupt,
        top_features=limit,
        batch_size=batch_size,
    )
    if check:
        found = patching.check(
            found,
            opened.model,
            opened.tokenizer,
            contrasts,
            sae=sae,
            corrupt=corrupt,
            batch_size=batch_size,
        )
    if not json_:
        print(attribution_view.shown(found, limit=limit, measured=check))
        return
    agreement = {
        "nodes": patching.rank_correlation(found.nodes),
        "features": patching.rank_correlation(found.features),
    }
    print(json.dumps({**found.to_dict(), "rank_correlation": agreement}))
