"""The files beside an SAE's weights: a checksum that tells a damaged one, and densities."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saesteer.core.files import sha256
from saesteer.core.sae import load_sae
from saesteer.core.sae_files import CHECKSUM
from saesteer.errors import SaeError
from tests.test_sae import ARCHITECTURES, D_SAE, make_sae

# Importing sae_lens raises a warning of transformer_lens's.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")
]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_any_flipped_bit_of_the_weights_is_told(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "sae"
    sae = make_sae(kind)
    sae.save(folder)
    path = folder / "sae_weights.safetensors"
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(whole), (40,), generator=generator).tolist()
    for place in (*places, len(whole) - 1):
        # The lowest bit of a number's mantissa changes no code that anybody would notice.
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(SaeError) as raised:
            load_sae(folder)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    path.write_bytes(whole)
    assert load_sae(folder).hash == sae.hash


def test_the_message_names_both_ways_on(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    make_sae("topk").save(folder)
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"b_dec": tensors["b_dec"] + 1}, path)
    with pytest.raises(SaeError, match=rf"not the file that was saved.*take {CHECKSUM} out"):
        load_sae(folder)
    config = json.loads((folder / "cfg.json").read_text())
    del config[CHECKSUM]
    (folder / "cfg.json").write_text(json.dumps(config))
    torch.testing.assert_close(load_sae(folder).b_dec, tensors["b_dec"] + 1)


def test_weights_that_sae_lens_changed_and_saved_load(tmp_path: Path) -> None:
    """sae-lens carries our metadata over to weights that are other ones."""
    from sae_lens import SAE

    sae = make_sae("standard")
    sae.save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    assert config[CHECKSUM] == sha256(tmp_path / "ours" / "sae_weights.safetensors")
    theirs = SAE.load_from_disk(tmp_path / "ours")
    theirs.fold_W_dec_norm()
    theirs.save_model(tmp_path / "theirs")
    loaded = load_sae(tmp_path / "theirs")
    torch.testing.assert_close(loaded.W_dec.norm(dim=-1), torch.ones(D_SAE))
    # What an overwritten folder of ours holds afterwards is theirs too.
    theirs.save_model(tmp_path / "ours")
    assert load_sae(tmp_path / "ours").hash == loaded.hash != sae.hash


def test_densities_are_saved_beside_the_weights_and_change_no_code(tmp_path: Path) -> None:
    from sae_lens.constants import SPARSITY_FILENAME

    folder = tmp_path / "sae"
    make_sae("jumprelu").save(folder)
    assert not (folder / SPARSITY_FILENAME).exists()
    assert load_sae(folder).log10_density is None

    density = torch.linspace(0, 1, D_SAE).log10().clamp_min(-10)
    sae = make_sae("jumprelu", log10_density=density)
    sae.save(folder)
    assert torch.equal(load_file(folder / SPARSITY_FILENAME)["sparsity"], density)
    loaded = load_sae(folder)
    assert loaded.log10_density is not None
    assert torch.equal(loaded.log10_density, density)
    assert loaded.hash == sae.hash == make_sae("jumprelu").hash

    # Saved again without them, the old ones don't stay behind.
    make_sae("jumprelu").save(folder)
    assert load_sae(folder).log10_density is None


def test_densities_that_are_damaged_or_of_another_sae_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    make_sae("topk").save(folder)
    path = folder / "sparsity.safetensors"
    for content, named in (
        ({"sparsity": torch.zeros(3)}, r"log10_density is of shape \(3,\)"),
        ({"density": torch.zeros(D_SAE)}, "sparsity.safetensors holds no 'sparsity'"),
    ):
        save_file(content, path)
        with pytest.raises(SaeError, match=named):
            load_sae(folder)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(SaeError, match=r"sparsity\.safetensors is truncated or damaged"):
        load_sae(folder)
