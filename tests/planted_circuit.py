"""A tiny model whose answer is carried by one head and one MLP, and contrasts that need them.

The embedding of "sea" is +1 and that of "sun" −1 on dimension 0. Head 2 of layer 1 attends evenly
to everything before it and copies dimension 0 to dimension 1; the MLP of layer 2 makes of it
dimension 2, positive after "sea" and negative after "sun", which raises "good" over "bad" or the
other way round. Every other part is random and small, and writes none of these dimensions.
"""

import torch
from transformers import PreTrainedModel

from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.directions.pairs import Pair
from tests.tiny import tiny_model, tiny_sae, tiny_tokenizer

HEAD, MLP = HookPoint(1, "head.2"), HookPoint(2, "mlp_out")
SAE_POINT = HookPoint(1, "resid_post")
PLANTED = {7, 9}
"""The features of `planted_sae` that read dimension 1, one a sign."""
_KEY, _CARRIED, _ANSWER = 0, 1, 2
_FILLERS = [
    "boy",
    "girl",
    "dog",
    "cat",
    "ship",
    "house",
    "tree",
    "garden",
    "bird",
    "river",
    "stone",
]


def planted_model() -> PreTrainedModel:
    model = tiny_model("llama", num_key_value_heads=4)
    ids = tiny_tokenizer().convert_tokens_to_ids
    with torch.no_grad():
        own = [_KEY, _CARRIED, _ANSWER]
        embedding = model.model.embed_tokens.weight
        embedding[:, own] = 0
        embedding[ids("sea"), _KEY], embedding[ids("sun"), _KEY] = 0.3, -0.3
        for block in model.model.layers:
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight.mul_(0.1)
                projection.weight[own] = 0
        attention = model.model.layers[HEAD.layer].self_attn
        columns = slice(16, 24)  # heads are 8 wide
        attention.q_proj.weight[columns] = 0
        attention.v_proj.weight[columns] = 0
        attention.v_proj.weight[columns.start, _KEY] = 1.0
        attention.o_proj.weight[:, columns] = 0
        attention.o_proj.weight[_CARRIED, columns.start] = 0.3
        mlp = model.model.layers[MLP.layer].mlp
        for neuron, sign in ((0, 1.0), (1, -1.0)):
            mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = 0, 0
            mlp.down_proj.weight[:, neuron] = 0
            mlp.gate_proj.weight[neuron, _CARRIED] = 4.0 * sign
            mlp.up_proj.weight[neuron, _CARRIED] = sign
            mlp.down_proj.weight[_ANSWER, neuron] = 0.05 * sign
        head = model.lm_head.weight
        head[:, own] = 0
        head[ids("good"), _ANSWER], head[ids("bad"), _ANSWER] = 2.0, -2.0
    return model


def contrasts(n: int, *, seed: int = 0) -> tuple[list[Pair], list[str]]:
    """Pairs whose prompts hold "sea" or "sun", and their prompts with the other of the two."""
    rng = torch.Generator().manual_seed(seed)
    pairs, corrupt = [], []
    for i in range(n):
        length = int(torch.randint(4, 8, (1,), generator=rng))
        words = [_FILLERS[j] for j in torch.randint(len(_FILLERS), (length,), generator=rng)]
        place = int(torch.randint(length, (1,), generator=rng))
        sides = []
        for key in ("sea", "sun") if i % 2 else ("sun", "sea"):
            words[place] = key
            sides.append(" ".join(words))
        right, wrong = (" good", " bad") if i % 2 else (" bad", " good")
        pairs.append(Pair(sides[0], right, wrong))
        corrupt.append(sides[1])
    return pairs, corrupt


def planted_sae(**conventions: object) -> Sae:
    """An SAE with a feature for either sign of what the head carries, and others without it."""
    sae = tiny_sae(point=SAE_POINT, **conventions)
    sae.W_enc[_CARRIED], sae.W_dec[:, _CARRIED], sae.b_dec[_CARRIED] = 0, 0, 0
    for feature, sign in zip(sorted(PLANTED), (1.0, -1.0), strict=True):
        sae.W_enc[:, feature], sae.W_dec[feature] = 0, 0
        sae.b_enc[feature] = 0
        sae.W_enc[_CARRIED, feature] = sae.W_dec[feature, _CARRIED] = sign
    return sae
