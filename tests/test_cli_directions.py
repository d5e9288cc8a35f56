"""`saesteer directions`: what is kept, sums of it, and what each does to generation."""

import json
import shutil

import pytest
import torch

from saesteer import vectors
from saesteer.cli import directions as command
from saesteer.core.generate import prompt_ids
from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions.direction import Direction
from saesteer.directions.pairs import Pair
from saesteer.effects import apply, generating
from saesteer.effects.calibrate import mean_norm
from saesteer.effects.damage import Reference, distinct_n
from saesteer.errors import SteeringError, TextError
from saesteer.run import Run
from saesteer.steering.edits import Add
from saesteer.units import neutral_tokens
from saesteer.world import corpus
from tests.command import as_terminal
from tests.command import run as said
from tests.tiny import tiny_model, tiny_tokenizer

PAIRS = tuple(Pair(**pair) for pair in corpus.pairs("sea", 32, seed=0))
MELBO = {"n": 1, "steps": 4, "most_prompts": 3}


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory):
    """A run that keeps a few directions; tests only add to it."""
    path = tmp_path_factory.mktemp("directions") / "run"
    shutil.copytree(small_run.path, path)
    run = Run(path, Run.open(path).config, model_of=small_run)
    vectors.fit(run, PAIRS, name="sea")
    vectors.fit(run, PAIRS, name="sea-lat", method="lat")
    vectors.fit(run, PAIRS, name="odd", method="melbo", options=MELBO)
    vectors.fit(run, PAIRS, name="control", method="melbo", options={**MELBO, "random_init": True})
    vectors.fit(run, PAIRS, name="heads", method="iti", options={"heads": 2})
    vectors.fit(run, PAIRS, name="leace", method="leace")
    vectors.fit(run, PAIRS, name="out", method="ablate")
    return path


def lines_of(out):
    """Rows by their name, with the lines that go on with them."""
    found, name = {}, ""
    for line in filter(str.strip, out.splitlines()):
        name = name if line.startswith(" ") else line.split()[0]
        found[name] = " ".join([*found.get(name, "").split(), *line.split()])
    return found


class TestTable:
    def test_each_is_one_row(self, capsys, folder):
        out, _ = said(capsys, f"directions {folder}")
        rows = lines_of(out.split("\n\n")[0])
        assert list(rows)[1:] == [
            "control-1", "heads", "leace", "odd-1", "out", "sea", "sea-lat",
        ]  # fmt: skip
        sea = Run.open(folder).load_vector("sea")
        assert "32 pairs" in rows["sea"] and f"{float(sea.vector.norm()):.4g}" in rows["sea"]
        assert "3 prompts" in rows["odd-1"] and "pairs" not in rows["odd-1"]
        assert "a control" in rows["control-1"]
        assert "parts" in rows["heads"] and rows["leace"].endswith("map")

    def test_it_fits_the_terminal(self, capsys, folder, tmp_path, monkeypatch):
        shutil.copytree(folder, tmp_path / "run")
        steers = tmp_path / "run" / "steers"
        sea = Direction.load(steers / "sea.safetensors")
        made = {"expression": "sea - 0.5*a-direction-of-a-long-name", "made_of": []}
        Direction(sea.vector, sea.point, "mean-difference-unpaired", 128, sea.read, "another",
                  made).save(steers / "a-longish-name.safetensors")  # fmt: skip
        out, _ = said(capsys, f"directions {tmp_path / 'run'}")
        assert max(map(len, out.splitlines())) <= 80
        row = lines_of(out)["a-longish-name"]
        for word in ("128", "pairs", "layers.1.resid_post", "another", "sea"):
            assert word in row.split()
        as_terminal(monkeypatch, 140)
        out, _ = said(capsys, f"directions {tmp_path / 'run'}")
        assert 80 < max(map(len, out.split("\n\n")[0].splitlines())) <= 140
        assert not any(line.startswith(" ") for line in out.split("\n\n")[0].splitlines())

    def test_melbo_is_shown_beside_random_and_its_control(self, capsys, folder):
        kept, _ = command.kept_in(folder)
        facts, control = (kept[name][0].provenance for name in ("odd-1", "control-1"))
        assert facts["n_random"] == 20 and facts["random_most"] >= facts["random_effect"]
        out, _ = said(capsys, f"directions {folder}")
        told = " ".join(out.split("melbo: ")[1].split())
        assert f"(mean of 20, at most {facts['random_most']:.3g})" in told
        own, other = (f["effect"] / f["random_effect"] for f in (facts, control))
        assert f"{own:.2f} ×; on random weights {other:.2f} ×" in told

    def test_what_is_no_direction_of_this_model_is_said(self, capsys, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "run")
        steers = tmp_path / "run" / "steers"
        (steers / "broken.safetensors").write_text("none")
        (steers / "notes.txt").write_text("mine")
        (steers / "lora").mkdir()
        (steers / "lora" / "adapter_config.json").write_text("{}")
        shutil.copy(steers / "sea.safetensors", steers / "calm.steer.safetensors")
        sea = Direction.load(steers / "sea.safetensors")
        vector = Direction(sea.vector, sea.point, "lat", 9, sea.read, "another")
        vector.save(steers / "theirs.safetensors")
        out, _ = said(capsys, f"directions {tmp_path / 'run'}")
        table, rest = out.split("not listed")
        assert "fitted on another model" in lines_of(table)["theirs"]
        assert "fitted on another" not in lines_of(table)["sea"]
        assert "broken.safetensors" in rest and "is damaged" in rest
        assert (
            "notes.txt" in rest
            and "--load calm" in rest
            and "for peft" in rest
            and "pairs.cache" not in rest
        )
        found = json.loads(said(capsys, f"directions {tmp_path / 'run'} --json")[0])
        assert set(found["others"]) == {
            "broken.safetensors", "notes.txt", "calm.steer.safetensors", "lora",
        }  # fmt: skip
        assert [one["name"] for one in found["directions"] if one["foreign"]] == [
            "control-1",
            "theirs",
        ]

    def test_a_run_without_any(self, capsys, small_run, tmp_path):
        shutil.copytree(small_run.path, tmp_path / "run", ignore=shutil.ignore_patterns("steers"))
        assert "keeps no directions yet" in said(capsys, f"directions {tmp_path / 'run'}")[0]
        assert "saesteer vector" in said(capsys, f"directions {tmp_path / 'run'} --show", 2)[1]


class TestMake:
    def test_a_sum_is_kept_and_steers(self, capsys, folder):
        out, _ = said(
            capsys,
            f"directions {folder} --make 'c-1 = sea - 0.5*sea-lat' --make 'd = c-1 + odd-1'",
        )
        rows = lines_of(out)
        assert "sea - 0.5*sea-lat" in rows["c-1"] and "32 pairs, 3 prompts" in rows["d"]
        run = Run.open(folder)
        sea, lat, made = (run.load_vector(name) for name in ("sea", "sea-lat", "c-1"))
        torch.testing.assert_close(made.vector, sea.vector - 0.5 * lat.vector)
        assert len(made.provenance["made_of"]) == 2
        (edit,) = run.edits(vector={"c-1": 2.0})
        assert isinstance(edit, Add) and edit.strength == 2.0
        # Made again it is another; what was fitted is not overwritten.
        said(capsys, f"directions {folder} --make 'c-1 = orthogonal(sea-lat, sea)'")
        assert abs(float(run.load_vector("c-1").vector @ sea.vector)) < 1e-4
        for name in ("c-1", "d"):
            run.vector_path(name).unlink()

    def test_edits_are_not_offered_as_directions(self, capsys, folder):
        edits = folder / "steers" / "kept.steer.safetensors"
        shutil.copy(folder / "steers" / "sea.safetensors", edits)
        _, err = said(capsys, f'directions {folder} --make "x = kelp + sea"', 2)
        edits.unlink()
        assert "no direction 'kelp'" in err and "sea-lat" in err and "kept" not in err

    @pytest.mark.parametrize(
        ("expression", "message"),
        [
            ("sea = sea-lat", "take another name"),
            ("x sea", 'expected "NAME = EXPRESSION"'),
            ("x = se + 1", "no direction 'se' (did you mean 'sea'?)"),
            ("x = heads", "2 parts of iti, and no single direction"),
            ("x = leace", "no single direction"),
            ("x = out + sea", "a direction to ablate"),
            ("x = sea + control-1", "fitted on another model"),
            ("../x = sea", "is not a name"),
            ("x.steer = sea", "use letters, digits, dashes and underscores"),
        ],
    )
    def test_what_cannot_be_is_refused(self, capsys, folder, expression, message):
        before = sorted(folder.rglob("*.safetensors"))
        _, err = said(capsys, f'directions {folder} --make "{expression}"', 2)
        assert message in err
        assert sorted(folder.rglob("*.safetensors")) == before


class TestShow:
    def test_each_is_at_one_kl_and_compared_at_one_length(self, capsys, folder):
        line = f"directions {folder} --show 'sea*' odd-1 --max-new-tokens 6 --json"
        found = json.loads(said(capsys, line)[0])
        assert found["own_text"] and found["failed"] == {}
        rows = {row["name"]: row for row in found["rows"]}
        assert set(rows) == {"sea", "sea-lat", "odd-1"}
        run = Run.open(folder)
        texts = neutral_tokens(run, 8)
        reference = Reference(run.model, run.tokenizer, texts)
        length = 0.5 * mean_norm(run.model, run.tokenizer, run.hook_point, texts)
        for name, row in rows.items():
            vector = run.load_vector(name).vector
            cost = reference.cost(run.edits(vector={name: row["strength"]}))
            assert (cost.kl, cost.delta_ce) == pytest.approx((row["kl"], row["delta_ce"]))
            assert row["kl"] == pytest.approx(0.5, rel=0.05)
            alike = Add(vector, length / float(vector.norm()), run.hook_point)
            assert row["kl_at_length"] == pytest.approx(reference.cost([alike]).kl, rel=1e-4)
        ordered = [row["kl_at_length"] for row in found["rows"]]
        assert ordered == sorted(ordered, reverse=True)
        chance = rows["sea"]["chance"]
        assert chance["n"] == 20 and 0 < chance["mean"] < chance["most"]
        assert list(found["melbo"]) == ["odd-1"]

    def test_the_page_has_a_line_with_and_one_without(self, capsys, folder):
        out, _ = said(
            capsys,
            f"directions {folder} --show sea leace out control-1 --max-new-tokens 6 "
            "--prompt 'The sailor saw the' --prompt 'A queen'",
        )
        assert all(len(line) <= 80 for line in out.splitlines())
        pages = {page.split(":")[0].split("\n")[0]: page for page in out.split("\n\n")}
        assert "The sailor saw the" in out
        for word in ("strength", "cost", "at equal length", "promotes", "without", "with "):
            assert f"  {word}" in pages["sea"]
        # What has a strength of its own is shown at it.
        assert "  strength         1\n" in pages["leace"] and "promotes" not in pages["leace"]
        assert "  strength         1\n" in pages["out"]
        assert "it steers nothing" in pages["control-1"] and "random of" in pages["control-1"]

    def test_names_and_options_that_say_nothing_are_refused(self, capsys, folder):
        assert "no direction 'see'" in said(capsys, f"directions {folder} --show see", 2)[1]
        assert "add --show" in said(capsys, f"directions {folder} --prompt x", 2)[1]
        assert "--seed -1: expected" in said(capsys, f"directions {folder} --seed -1", 2)[1]
        assert "KL budget" in said(capsys, f"directions {folder} --show sea --kl-budget 0", 2)[1]


class TestSeen:
    POINT = HookPoint(1, "resid_post")

    def given(self):
        model, tokenizer = tiny_model(), tiny_tokenizer()
        rng = torch.Generator().manual_seed(0)

        def drawn(point=self.POINT):
            vector = torch.randn(32, generator=rng)
            return Direction(vector, point, "lat", 32, "answer-mean", fingerprint(model))

        return model, tokenizer, drawn

    def test_without_text_costs_are_on_what_the_model_writes(self):
        model, tokenizer, drawn = self.given()
        part = drawn()
        prompts = ["the boy saw", "rain in the house"]
        found = generating.seen(
            model, tokenizer, {"it": [part]}, prompts=prompts, strength=3.0,
            max_new_tokens=8, temperature=0.0,
        )  # fmt: skip
        (row,) = found.rows
        assert not found.own_text and row.delta_ce is None
        rows, _ = prompt_ids(tokenizer, prompts, prepend_bos=True)
        written = generating.continuations(
            model, tokenizer, rows, [[]] * 2, max_new_tokens=8, temperature=0.0, seeds=[0, 1]
        )
        reference = Reference(model, tokenizer, [[*one.prompt, *one.new] for one in written])
        assert row.kl == pytest.approx(reference.cost(apply.edits(part, 3.0)).kl)
        assert found.n_tokens == reference.n_tokens
        assert found.plain.texts == tuple(one.text for one in written)
        assert found.plain.distinct_2 == distinct_n([one.new for one in written], 2)
        assert row.length == pytest.approx(3 * float(part.vector.norm()))
        assert row.written.texts != found.plain.texts

    def test_nothing_added_changes_nothing(self):
        model, tokenizer, drawn = self.given()
        found = generating.seen(
            model, tokenizer, {"it": [drawn()]}, prompts=["the boy"], strength=0.0
        )
        assert found.rows[0].kl == 0 and found.rows[0].written == found.plain

    def test_backwards_is_the_other_way(self):
        model, tokenizer, drawn = self.given()
        part, how = drawn(), {"prompts": ["the boy"], "max_new_tokens": 4}
        one = generating.seen(model, tokenizer, {"it": [part]}, strength=-2.0, **how).rows[0]
        other = generating.seen(model, tokenizer, {"it": [-part]}, strength=2.0, **how).rows[0]
        assert [token for token, _ in one.promotes] == [token for token, _ in other.promotes]
        for field in ("kl", "kl_at_length", "length", "written", "chance"):
            assert getattr(one, field) == getattr(other, field)

    def test_one_that_cannot_be_shown_leaves_the_others(self):
        model, tokenizer, drawn = self.given()
        nothing = Direction(torch.zeros(32), self.POINT, "lat", 1, "answer-mean", "x")
        found = generating.seen(
            model, tokenizer, {"none": [nothing], "some": [drawn()]}, prompts=["the boy"],
            max_new_tokens=4, kl_budget=0.02,
        )  # fmt: skip
        assert [row.name for row in found.rows] == ["some"] and set(found.failed) == {"none"}
        given = generating.seen(model, tokenizer, {"none": [nothing]}, strength=2.0)
        assert given.rows[0].kl == 0 and given.rows[0].chance is None

    def test_where_no_strength_costs_so_much_it_is_as_long_as_the_others(self):
        model, tokenizer, drawn = self.given()
        found = generating.seen(
            model, tokenizer, {"it": [drawn()]}, prompts=["the boy"], kl_budget=50.0,
            max_new_tokens=4,
        )  # fmt: skip
        (row,) = found.rows
        assert row.missed and row.length == pytest.approx(row.chance.length)
        assert row.kl == pytest.approx(row.kl_at_length, rel=1e-4)

    def test_no_prompts_and_no_numbers_are_refused(self):
        model, tokenizer, drawn = self.given()
        with pytest.raises(TextError, match="no prompt"):
            generating.seen(model, tokenizer, {"it": [drawn()]}, prompts=[])
        with pytest.raises(SteeringError, match="finite"):
            generating.seen(model, tokenizer, {"it": [drawn()]}, strength=float("nan"))
