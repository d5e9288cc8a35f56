"""The sparse products: torch's forms against dense products, Triton's kernels against torch's.

Without a GPU the kernels run in Triton's interpreter, which has to be chosen before Triton is
imported: this file runs itself in a process of its own, once, and its tests read what came out.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from saesteer.training import products

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Case(NamedTuple):
    """fires: bool [n_rows, d_sae]; left [n_rows, d]; right [d_sae, d]."""

    fires: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def random(cls, fires: torch.Tensor, d: int, dtype: torch.dtype = torch.float32) -> "Case":
        generator = torch.Generator().manual_seed(d)
        left, right = (torch.randn(n, d, generator=generator) for n in fires.shape)
        return cls(fires, left.to(dtype), right.to(dtype))

    def code(self) -> torch.Tensor:
        """A value for each pair that fires, [n_rows, d_sae]."""
        generator = torch.Generator().manual_seed(1)
        values = torch.rand(self.fires.shape, generator=generator).add(0.1)
        return values.to(self.fires.device) * self.fires

    def results(self, decode, gathered, multiply) -> dict[str, torch.Tensor]:
        """What three functions make of the pairs, with `products`' arguments."""
        rows, latents = self.fires.nonzero(as_tuple=True)
        order = latents.argsort(stable=True)
        values = self.code()[rows, latents]
        starts, latent_starts = (n.cumsum(0) - n for n in (self.fires.sum(1), self.fires.sum(0)))
        return {
            "decode": decode(latents, values, starts, self.right),
            "gathered": gathered(rows[order], values[order], latent_starts, self.left),
            "products": multiply(rows, latents, self.left, self.right),
        }

    def dense(self) -> dict[str, torch.Tensor]:
        code, left, right = self.code().double(), self.left.double(), self.right.double()
        return {
            "decode": code @ right,
            "gathered": code.T @ left,
            "products": (left @ right.T)[self.fires],
        }


def sparse(n_rows: int, d_sae: int) -> torch.Tensor:
    """Rows and latents with several pairs, with one and with none; latent 2 fires in most rows."""
    fires = torch.rand(n_rows, d_sae, generator=torch.Generator().manual_seed(0)) < 0.2
    fires[:, 2] = True
    fires[3] = fires[-1] = False
    fires[:, 0] = fires[:, 5] = fires[:, -1] = False
    return fires


def one_a_row(n_rows: int, latents: torch.Tensor, d_sae: int) -> torch.Tensor:
    return torch.zeros(n_rows, d_sae, dtype=torch.bool).scatter_(1, latents[:, None], True)


def cases() -> dict[str, Case]:
    made = {f"d={d}": Case.random(sparse(9, 11), d) for d in (1, 7, 64, 130)}
    made |= {
        f"{dtype}": Case.random(sparse(9, 11), 33, dtype)
        for dtype in (torch.bfloat16, torch.float16)
    }
    made["nothing fires"] = Case.random(torch.zeros(4, 6, dtype=torch.bool), 8)
    made["one row, one latent"] = Case.random(torch.ones(1, 1, dtype=torch.bool), 3)
    made["k=1"] = Case.random(one_a_row(20, torch.arange(20) * 7 % 13, 13), 20)
    # The kernels' chunks are of 128 pairs.
    made["every row"] = Case.random(one_a_row(140, torch.full((140,), 3), 5), 6)
    made["whole chunks"] = Case.random(one_a_row(256, torch.arange(256) // 128 * 2, 4), 6)
    made["between chunks"] = Case.random(one_a_row(330, (torch.arange(330) + 40) // 160, 4), 6)
    made["a chunk and a pair"] = Case.random(one_a_row(258, torch.arange(258) // 129, 2), 6)
    made["every latent"] = Case.random(torch.ones(3, 140, dtype=torch.bool), 5)
    wide = Case.random(sparse(9, 11), 40)
    made["columns of a wider table"] = wide._replace(
        left=wide.left[:, 3:20], right=wide.right[:, 9:26]
    )
    made["every other column"] = wide._replace(left=wide.left[:, ::2], right=wide.right[:, 1::2])
    return made


CASES = cases()
TARGETS = (("fp32", 80), ("bf16", 90))
PRODUCTS = ("decode", "gathered", "products")


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].cpu().double(), value.cpu().double(), rtol=1e-5, atol=1e-5, msg=name
        )


def of_torch(case: Case) -> dict[str, torch.Tensor]:
    return case.results(products.decode, products.gathered, products.products)


@pytest.mark.parametrize("name", CASES)
def test_torch_forms_equal_dense_products(name):
    found = of_torch(CASES[name])
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_close(found, CASES[name].dense())


def test_large_tables_are_read_in_order_with_the_same_result(monkeypatch):
    case = Case.random(sparse(9, 60), 7)
    in_place = of_torch(case)["products"]
    monkeypatch.setattr(products, "_LARGE", 0)
    sampled = []
    monkeypatch.setattr(
        products, "_sampled", lambda *args, of=products._sampled: sampled.append(args) or of(*args)
    )
    assert torch.equal(of_torch(case)["products"], in_place)
    assert sampled[0][2] is case.right  # the roles are swapped: it is read latent by latent


def test_double_precision_is_kept():
    case = Case.random(sparse(9, 11), 7, torch.float64)
    for name, value in of_torch(case).items():
        assert value.dtype == torch.float64
        if name == "products":  # the code's own values are float32
            torch.testing.assert_close(value, case.dense()[name], rtol=1e-13, atol=1e-13)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, dict[str, float]]:
    """The largest error of each kernel in each case, relative where the value exceeds one."""
    out = tmp_path_factory.mktemp("interpreted") / "errors.json"
    child(["errors", str(out)], TRITON_INTERPRET="1")
    return json.loads(out.read_text())


def child(arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_torch_in_the_interpreter(name, interpreted):
    assert interpreted[name].keys() == set(PRODUCTS)
    assert max(interpreted[name].values()) < 1e-5, interpreted[name]


@needs_triton
def test_a_segment_of_thousands_is_summed_by_chunks(interpreted):
    assert interpreted["thousands"]["weighted_sums"] < 1e-5


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    if not find_spec("triton.backends.nvidia"):
        pytest.skip("this Triton was built without its NVIDIA backend")
    compiled = json.loads(child(["compile"], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"))
    assert set(compiled) == {
        f"{kernel} {table} sm_{capability}"
        for kernel in ("_sum_chunks", "_sum_segments", "_multiply")
        for table, capability in TARGETS
    }
    for name, atomics in compiled.items():
        assert atomics == 0, f"{name} adds in no fixed order"


@needs_triton
def test_kernels_are_chosen_for_cuda_tensors_alone():
    on_gpu, elsewhere = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    chosen = products._kernels(on_gpu, torch.float32)
    assert chosen is not None and chosen.__name__ == "saesteer.training.kernels"
    assert products._kernels(elsewhere, torch.float32) is None
    assert products._kernels(on_gpu, torch.float64) is None


def test_torch_forms_are_used_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(products, "find_spec", lambda name: None)
    products._with_triton.cache_clear()
    try:
        assert products._kernels(SimpleNamespace(is_cuda=True), torch.float32) is None
    finally:
        products._with_triton.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark is run")
def test_the_benchmark_says_what_it_did_not_run():
    script = Path(__file__).parents[1] / "benchmarks" / "kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("not run: ")


@needs_gpu
@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_torch_on_a_gpu_and_repeat_themselves(name):
    case = CASES[name]
    on_gpu = Case(*(tensor.cuda() for tensor in case))
    first, second = of_torch(on_gpu), of_torch(on_gpu)
    assert_close(first, of_torch(case))
    for product in PRODUCTS:
        assert torch.equal(first[product], second[product])


def errors(path: str) -> None:
    """In a process of its own: the kernels' errors in every case, as JSON."""
    from saesteer.training import kernels

    def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
        assert actual.dtype == torch.float32 and actual.shape == expected.shape
        distance = (actual - expected).abs() / expected.abs().clamp(min=1)
        assert not distance.isnan().any()
        return float(distance.max()) if distance.numel() else 0.0

    found = {}
    for name, case in CASES.items():
        ours = case.results(kernels.weighted_sums, kernels.weighted_sums, kernels.pair_products)
        theirs = of_torch(case)
        found[name] = {product: worst(ours[product], theirs[product]) for product in PRODUCTS}
    generator = torch.Generator().manual_seed(0)
    index, table = torch.randint(5, (2500,), generator=generator), torch.rand(5, 6)
    listed = index, torch.rand(2500, generator=generator) / 50, torch.tensor([0, 37, 2400]), table
    distance = worst(kernels.weighted_sums(*listed), products.decode(*listed))
    found["thousands"] = {"weighted_sums": distance}
    Path(path).write_text(json.dumps(found))


def compile_all() -> None:
    """In a process of its own: how many atomic operations each compiled kernel has, as JSON."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from saesteer.training import kernels

    tables = {"table", "left", "right"}
    lists = {"index", "starts", "owners", "rows", "latents"}
    sums = {"values", "sums", "out"}
    blocks = {"CHUNK": 128, "PAIRS": 16, "COLUMNS": 128}
    found = {}
    for kernel in (kernels._sum_chunks, kernels._sum_segments, kernels._multiply):
        for table, capability in TARGETS:
            types = dict.fromkeys(tables, f"*{table}") | dict.fromkeys(lists, "*i64")
            types |= dict.fromkeys(sums, "*fp32") | dict.fromkeys(blocks, "constexpr")
            source = ASTSource(
                kernel,
                signature={name: types.get(name, "i32") for name in kernel.arg_names},
                constexprs={n: size for n, size in blocks.items() if n in kernel.arg_names},
            )
            target = GPUTarget("cuda", capability, 32)
            made = triton.compile(source, target=target, options={"enable_fp_fusion": True})
            assert made.asm["cubin"]
            atomics = len(re.findall(r"\b(?:atom|red)\.", made.asm["ptx"]))
            found[f"{kernel.__name__} {table} sm_{capability}"] = atomics
    print(json.dumps(found))


if __name__ == "__main__":
    errors(*sys.argv[2:]) if sys.argv[1] == "errors" else compile_all()
