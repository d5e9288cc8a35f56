"""Names of places in a model: `layers.6.resid_post` and its spellings elsewhere."""

import re
from dataclasses import dataclass

from saesteer.errors import HookPointError, did_you_mean

SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")
HEAD = "head."

_OWN = re.compile(r"layers\.(\d+)\.(\w+(?:\.\d+)?)")
_HEAD = re.compile(r"head\.\d+")
# In the order in which a block comes by them; heads come just before attn_out.
_ORDER = ("resid_pre", HEAD, "attn_out", "mlp_out", "resid_post")
_SAELENS = re.compile(r"blocks\.(\d+)\.hook_(\w+)")
# A path of modules as `named_modules` writes it, ending at a block or at one of its two halves.
_MODULE = re.compile(r"(?:[A-Za-z_]\w*\.)*?(?:layers|h|blocks|block)\.(\d+)(?:\.(\w+))?")
_MODULE_SITES: dict[str | None, str] = {
    None: "resid_post",
    **dict.fromkeys(("mlp", "ffn", "feed_forward"), "mlp_out"),
    **dict.fromkeys(("attn", "self_attn", "attention", "self_attention"), "attn_out"),
}


@dataclass(frozen=True, order=True)
class HookPoint:
    """A place in a decoder: a 0-based block and a site in it.

    Sites: `resid_pre` and `resid_post` are the residual stream as it enters and leaves the block;
    `attn_out` and `mlp_out` are what the block's two halves add to it (after any post-norm);
    `head.5` is the 0-based attention head's own output [d_head], before the output projection.
    """

    layer: int
    site: str

    def __post_init__(self) -> None:
        if self.site not in SITES and not _HEAD.fullmatch(self.site):
            raise HookPointError(
                f"no site {self.site!r}{did_you_mean(self.site, SITES)}: "
                f"a hook point ends in one of {', '.join(SITES)}, head.<number>"
            )
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise HookPointError(f"layer {self.layer!r} is not a whole number from 0 up")

    @classmethod
    def parse(cls, text: str) -> "HookPoint":
        """The point written `layers.<layer>.<site>`; HookPointError for anything else."""
        match = _OWN.fullmatch(text.strip())
        if match is None:
            hint = ""
            if _SAELENS.fullmatch(text.strip()):
                hint = f" (did you mean {str(cls.from_saelens(text))!r}?)"
            raise HookPointError(
                f"{text!r} is not a hook point{hint}: write layers.<layer>.<site>, "
                f"for example layers.6.resid_post; the sites are {', '.join(SITES)}, head.<number>"
            )
        return cls(int(match[1]), match[2])

    @property
    def head(self) -> int | None:
        """The attention head's number, None for any other site."""
        return int(self.site.removeprefix(HEAD)) if self.site.startswith(HEAD) else None

    @property
    def depth(self) -> tuple[int, int]:
        """Grows in the order in which a forward pass comes by the points."""
        return self.layer, _ORDER.index(HEAD if self.head is not None else self.site)

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.site}"

    def to_saelens(self) -> str:
        """The name in SAELens and TransformerLens: `blocks.6.hook_resid_post`.

        Raises HookPointError for a single head, which has no name there.
        """
        if self.head is not None:
            raise HookPointError(f"{self}: SAELens has no name for a single head")
        return f"blocks.{self.layer}.hook_{self.site}"

    @classmethod
    def from_saelens(cls, name: str) -> "HookPoint":
        """The point that SAELens (`blocks.6.hook_resid_post`) or sparsify (`layers.6`) means.

        sparsify names the module whose output was read: a block alone is its `resid_post`, its
        MLP `mlp_out`. (Where a model norms a half's output before adding it, as Gemma 2 does, the
        module's output is not what is added, and such a SAE does not belong at `mlp_out`.)
        Raises HookPointError for the places that have no name here (hook_z, hook_resid_mid, …).
        """
        name = name.strip()
        if match := _SAELENS.fullmatch(name):
            site: str | None = match[2]
        elif match := _OWN.fullmatch(name):
            site = match[2] if match[2] in SITES else _MODULE_SITES.get(match[2])
        elif match := _MODULE.fullmatch(name):
            site = _MODULE_SITES.get(match[2])
        if match is None or site not in SITES:
            raise HookPointError(
                f"hook point {name!r} is not supported: only {', '.join(SITES)} of a block are "
                "(blocks.<layer>.hook_<site> in SAELens, layers.<layer> or layers.<layer>.mlp "
                "in sparsify)"
            )
        return cls(int(match[1]), site)
