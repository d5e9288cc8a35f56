"""Models quantised or compiled, and ways to generate: steered rightly, or refused by name."""

import copy
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, TextIteratorStreamer, pipeline

from saesteer.core.hooks import capture
from saesteer.core.model import HookPoint
from saesteer.errors import NothingSteeredError, SteeringError
from saesteer.steering.bake import EVERYWHERE, bake
from saesteer.steering.conditions import Projection, When
from saesteer.steering.edits import Add, Clamp
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from tests.test_steering_devices import attributes
from tests.test_steering_rows import GREEDY
from tests.tiny import BOS, WIDTH, random_ids, tiny_model, tiny_sae, tiny_tokenizer

MIDDLE = HookPoint(1, "resid_post")


def vector(seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


ADD = Add(vector(), 2.0, MIDDLE)


# --- quantised layers ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch moves them to torchao
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # the same
def test_dynamically_quantised_layers_are_steered(tmp_path: Path) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(tiny_model(), {nn.Linear})
    layer = quantised.model.layers[1].self_attn.o_proj
    assert not isinstance(layer, nn.Linear) and not isinstance(layer.weight, Tensor)
    ids = random_ids(2, 5).clamp(min=4)
    with capture(quantised, [MIDDLE]) as plain:
        quantised(ids)
    for site in ("resid_post", "mlp_out"):
        edit = Add(vector(), 1.0, HookPoint(1, site))
        with torch.no_grad(), steer(quantised, edit), capture(quantised, [MIDDLE]) as found:
            quantised(ids)
        changed = found[MIDDLE] - plain[MIDDLE]
        torch.testing.assert_close(changed, edit.vector.expand(2, 5, -1))
    point = HookPoint(1, "head.3")
    edit = Add(vector(0, 8), 1.0, point)
    with capture(quantised, [point]) as plain:
        quantised(ids)
    with torch.no_grad(), steer(quantised, edit), capture(quantised, [point]) as found:
        quantised(ids)
    torch.testing.assert_close(found[point] - plain[point], edit.vector.expand(2, 5, -1))
    with torch.no_grad(), steer(quantised, Clamp(tiny_sae("topk"), 5, 8.0)) as receipt:
        quantised.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert receipt.edits[0].after_mean == 8.0
    with pytest.raises(SteeringError, match="can't be baked"):
        bake(quantised, Add(vector(), 1.0, MIDDLE, where=EVERYWHERE), tmp_path / "baked")


# --- compiled and traced parts -------------------------------------------------------------------


def compile_block(model: Any) -> None:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


def compile_block_in_place(model: Any) -> None:
    model.model.layers[1].compile(backend="eager")


def compile_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compile_base(model: Any) -> None:
    model.model.compile(backend="eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it loads its compiler
@pytest.mark.parametrize(
    "compiles", [compile_block, compile_block_in_place, compile_forward, compile_base]
)
def test_a_model_of_which_a_part_is_compiled_is_refused_by_name(compiles: Any) -> None:
    model = tiny_model()
    compiles(model)
    before = attributes(model)
    with pytest.raises(SteeringError, match="compiled"), steer(model, ADD):
        pass
    assert attributes(model) == before


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


@pytest.mark.filterwarnings("ignore")  # tracing warns of every branch
def test_what_was_traced_before_is_not_taken_for_steered() -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    traced = torch.jit.trace(Logits(model), ids, check_trace=False)
    with pytest.raises(NothingSteeredError), steer(model, ADD):
        traced(ids)
    with (
        pytest.raises(SteeringError, match="keep the edits for good"),
        steer(model, ADD),
    ):
        torch.jit.trace(Logits(model), ids, check_trace=False)


def test_a_pass_that_goes_around_the_edits_is_an_error() -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    other = copy.deepcopy(model.model.layers[1])
    with pytest.raises(SteeringError, match="1 of 2 forward passes"), steer(model, ADD):
        model(ids)
        model.model.layers[1] = other
        model(ids)


# --- ways to generate ----------------------------------------------------------------------------


def written(model: Any, ids: Tensor, edits: Any = ADD, **how: Any) -> list[list[int]]:
    settings = {**GREEDY, "attention_mask": torch.ones_like(ids), **how}
    with steer(model, edits) if edits else nullcontext():
        out: list[list[int]] = model.generate(ids, **settings).tolist()
    return out


@pytest.mark.filterwarnings("ignore:.*never applied")
@pytest.mark.parametrize(
    "how", ["static", "chunks", "lookup", "assistant", "worse assistant", "inference"]
)
@pytest.mark.parametrize("lasting", [None, "from", "until"])
def test_every_way_to_decode_greedily_writes_one_text(how: str, lasting: Any) -> None:
    settings: dict[str, Any] = {
        "static": {"cache_implementation": "static"},
        "chunks": {"prefill_chunk_size": 2},
        "lookup": {"prompt_lookup_num_tokens": 2},
        "assistant": {"assistant_model": tiny_model()},
        "worse assistant": {"assistant_model": tiny_model(seed=3)},
        "inference": {},
    }[how]
    when = lasting and When(Projection(vector(4), MIDDLE), 2.0, lasting)
    edit = Add(vector(), 2.0, MIDDLE, when=when)
    model, ids = tiny_model(), random_ids(1, 6).clamp(min=4)
    with torch.inference_mode() if how == "inference" else nullcontext():
        steered = written(model, ids, edit, **settings)
    assert steered == written(model, ids, edit) == written(model, ids, edit, use_cache=False)


@pytest.mark.parametrize("tokens", [6, 7, 9, 12])
def test_guesses_that_are_not_taken_are_in_no_receipt(tokens: int) -> None:
    model, ids, sae = tiny_model(), random_ids(1, 6).clamp(min=4), tiny_sae()
    edits = [Add(vector(), 2.0, MIDDLE), Clamp(sae, 5, 1.0, where=Positions(prompt=False))]
    how: dict[str, Any] = {**GREEDY, "max_new_tokens": tokens, "min_new_tokens": tokens}

    def told(**more: Any) -> Any:
        with steer(model, edits) as receipt:
            model.generate(ids, attention_mask=torch.ones_like(ids), **how, **more)
        return receipt

    plain = told()
    for more in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny_model()},
        {"assistant_model": tiny_model(seed=3)},
    ):
        guessed = told(**more)
        for number, (a, b) in enumerate(zip(guessed.edits, plain.edits, strict=True)):
            assert (a.counts, a.n_changed) == (b.counts, b.n_changed)
            assert a.relative_size == pytest.approx(b.relative_size, rel=1e-5)
            if number == 1:
                assert a.before_mean == pytest.approx(b.before_mean, rel=1e-4)
            seen = [[token[:2] for token in receipt.traces(number)[0][0]]
                    for receipt in (guessed, plain)]  # fmt: skip
            assert seen[0] == seen[1]


@pytest.mark.parametrize("arch", ["mamba", "mamba2", "rwkv"])
def test_a_state_that_does_not_tell_its_length_is_refused_and_steered_without(arch: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 3, "vocab_size": 96}
    sizes |= {"num_heads": 8, "head_dim": 8, "state_size": 8} if arch == "mamba2" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(arch, **sizes, bos_token_id=BOS, eos_token_id=2)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = random_ids(1, 5).clamp(min=4)
    for where, count in ((Positions(), 12), (Positions(generated=False), 5)):
        edit = Add(vector(), 2.0, MIDDLE, where=where)
        with steer(model, edit) as receipt:
            model.generate(ids, max_new_tokens=8, min_new_tokens=8, use_cache=False)
        assert receipt.edits[0].counts == [[count]]
        with pytest.raises(SteeringError, match="pass use_cache=False"), steer(model, edit):
            model.generate(ids, max_new_tokens=8, min_new_tokens=8)


def test_a_streamer_in_a_thread_and_a_pipeline_write_the_same() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = tokenizer("the boy saw", return_tensors="pt").input_ids
    expected = written(model, ids)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out: list[Any] = []
    with steer(model, ADD):
        thread = threading.Thread(
            target=lambda: out.append(written(model, ids, None, streamer=streamer))
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert out == [expected] and text == tokenizer.decode(expected[0][3:])
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with steer(model, ADD):
        (piped,) = made("the boy saw", return_tensors=True, max_new_tokens=8, do_sample=False)
    assert [piped["generated_token_ids"]] == expected != written(model, ids, None)


def test_forward_by_itself_and_the_base_model_are_steered_too() -> None:
    model, ids = tiny_model(), random_ids(2, 5).clamp(min=4)
    with torch.no_grad(), steer(model, ADD) as receipt:
        logits = model(ids).logits
        assert torch.equal(model.forward(ids).logits, logits)
        assert torch.equal(model.lm_head(model.model(ids).last_hidden_state), logits)
        parallel = nn.DataParallel(model)  # without a GPU it calls the model itself
        assert torch.equal(parallel(ids).logits, logits)
    assert receipt.edits[0].counts == [[5, 5]] * 4
    assert not torch.equal(model(ids).logits, logits)


def test_what_is_saved_meanwhile_is_the_unsteered_model(tmp_path: Path) -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    with torch.no_grad(), steer(model, ADD):
        model(ids)
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_generate_that_the_context_does_not_see_is_refused() -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    bound = model.generate
    edit = Add(vector(), 2.0, MIDDLE, where=Positions(generated=False))
    for generate in (bound, lambda *args, **how: type(model).generate(model, *args, **how)):
        with pytest.raises(SteeringError, match="within the context"), steer(model, edit):
            generate(ids, **GREEDY)
    with pytest.raises(SteeringError, match="continuous batching"), steer(model, edit):
        model.generate_batch([ids[0].tolist()])


@pytest.mark.parametrize("how", ["itself", "early exit", "guidance"])
def test_two_texts_at_once_in_one_generate_are_refused_by_name(how: str) -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    settings: dict[str, Any] = {
        "itself": {"assistant_model": model},
        "early exit": {"assistant_early_exit": 2},
        "guidance": {"guidance_scale": 2.0},
    }[how]
    with pytest.raises(SteeringError, match="whose tokens are whose"):
        written(model, ids, **settings)


def test_two_threads_in_one_model_at_once_are_refused() -> None:
    model, second, raised = tiny_model(), threading.Event(), []
    ids = random_ids(2, 5).clamp(min=4)

    def other() -> None:
        try:
            model(ids)
        except SteeringError as error:
            raised.append(str(error))

    def meanwhile(*_: Any) -> None:
        if not second.is_set():
            second.set()
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    model.model.layers[0].register_forward_hook(meanwhile)
    with torch.no_grad(), steer(model, ADD) as receipt:
        model(ids)
    assert len(raised) == 1 and "two threads" in raised[0]
    assert receipt.edits[0].counts == [[5, 5]]


def test_a_context_that_ends_before_its_text_does_is_an_error() -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    begun, ended = threading.Event(), threading.Event()

    def wait(_: Tensor, scores: Tensor) -> Tensor:
        begun.set()
        ended.wait(10)
        return scores

    thread = threading.Thread(target=lambda: written(model, ids, None, logits_processor=[wait]))
    with pytest.raises(SteeringError, match="another thread"), steer(model, ADD):
        thread.start()
        assert begun.wait(10)
    ended.set()
    thread.join()
