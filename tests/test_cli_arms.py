"""Every method and arm from the command line: listed, made, measured on held-out pairs, kept."""

import inspect
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from saesteer import arming
from saesteer.cli.main import main
from saesteer.cli.vector_options import shown
from saesteer.compare.arms import ARMS, Arm, arm
from saesteer.compare.held_out import hold_out
from saesteer.compare.prepared import Prepared, margins_of
from saesteer.core.model import fingerprint
from saesteer.directions.methods import METHODS
from saesteer.directions.pairs import Pair, write_pairs
from saesteer.errors import ConfigError, PairsError, RunError
from saesteer.run import Run
from saesteer.steering.edits import Add, Clamp
from tests.command import run as said
from tests.some_pairs import planted_pairs

PAIRS = planted_pairs("sea", 48)
TRAINS = ["sft-lora", "dpo-lora", "sft-augmented", "context-distillation"]
# Of a small SAE trained for a second, most features fire often.
EDITS = {
    "sae-clamp": "--set densest=1",
    "sae-add": "--set densest=1",
    "sae-auroc": "--set densest=1",
    "sae-topk": "--set densest=1 --set k=3",
    "sae-output-filtered": "--set densest=1 --set most=4 --set at_least=-1",
    "sae-ts": "--set densest=1 --set n=16 --set max_new_tokens=16",
    "gated": "--set of=sae-add --set 'when=1>0' --set densest=1",
}
QUICK = "--set steps=2 --set batch_size=4 --set learning_rates=[0.003]"


# peft asks transformers what the newest version calls otherwise.
peft_asks = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")


@pytest.fixture(scope="module")
def place(small_run, tmp_path_factory):
    """A folder with a run, files of pairs, and prompts that someone wrote."""
    folder = tmp_path_factory.mktemp("arms")
    shutil.copytree(small_run.path, folder / "run")
    write_pairs(folder / "pairs.jsonl", PAIRS)
    write_pairs(folder / "other.jsonl", planted_pairs("kitchen", 6, seed=9))
    (folder / "written.txt").write_text("".join(f"The sailor number {i} .\n" for i in "abcdefghi"))
    return folder


@pytest.fixture
def vector(place, monkeypatch, capsys):
    """The command on those files, and what it prints."""
    monkeypatch.chdir(place)
    return lambda line, code=0: said(capsys, f"vector run --pairs pairs.jsonl {line}", code)


def test_every_arm_has_a_line_and_a_paper_and_can_be_called():
    for name, one in ARMS.items():
        assert isinstance(one, Arm) and arm(name) is one and callable(one)
        assert one.line and len(one.line) <= 80 and one.paper
    for name in set(ARMS) & set(METHODS):
        assert (ARMS[name].line, ARMS[name].paper) == (METHODS[name].line, METHODS[name].paper)
    makes = {name: one.makes for name, one in ARMS.items() if name not in METHODS}
    assert [name for name, made in makes.items() if made == "model"] == [
        "context-distillation", "sft-lora", "dpo-lora", "sft-augmented",
    ]  # fmt: skip
    assert [n for n, made in makes.items() if made == "edits"] == list(EDITS)


def test_all_are_listed_in_groups_with_their_papers_and_options(capsys):
    out, _ = said(capsys, "vector --list")
    words = f" {' '.join(out.split())} "
    for name, one in {**METHODS, **ARMS}.items():
        assert f" {name} {one.line} {one.paper} " in words
    heads = [line for line in out.splitlines() if line.endswith(":")]
    groups = ["directions", "readers", "features of the SAE", "prompts", "trained"]
    assert heads == [f"{group}:" for group in groups]
    assert "--set of=METHOD when='FEATURE>NUMBER'" in out and "written=FILE" in out
    assert "learning_rates=[0.0003,0.001,0.0001,0.003]" in out
    listed = {one["name"]: one for one in json.loads(said(capsys, "vector --list --json")[0])}
    assert set(listed) == set(METHODS) | set(ARMS)
    assert [listed[n]["group"] for n in ("lat", "ccs", "gated", "prompt", "sft-lora")] == groups
    assert listed["few-shot"]["options"] == ["k=5"]


def test_every_row_has_an_example_on_the_page():
    page = (Path(__file__).parents[1] / "docs" / "directions.md").read_text()
    used = {words[i + 1] for words in map(str.split, page.splitlines())
            for i, word in enumerate(words[:-1]) if word == "--method"}  # fmt: skip
    assert used == set(arming.rows())


def test_an_option_is_shown_as_it_is_given():
    def function(*, a: int | None = None, b: bool = True, c: str = " ", d: str = "x"):
        """Its parameters are what matters."""

    found = [shown(option) for option in inspect.signature(function).parameters.values()]
    assert found == ["a=NUMBER", "b=true", 'c=" "', "d=x"]


@pytest.mark.parametrize("method", EDITS)
def test_edits_are_kept_and_the_next_line_steers_with_them(vector, capsys, place, method):
    out, _ = vector(f"--method {method} --name {method} {EDITS[method]}")
    assert "of 36 pairs" in out and "margin on 12 held-out pairs: " in out
    (line,) = [line for line in out.splitlines() if line.startswith("next: saesteer ")]
    opened = Run.open(place / "run")
    edits = opened.load_edits(method)
    assert type(edits[0]) is (Clamp if method in ("sae-clamp", "sae-auroc") else Add)
    assert (edits[0].when is not None) == (method == "gated")
    words = shlex.split(line.removeprefix("next: saesteer ").replace("…", PAIRS[0].prompt))
    assert main([*words, "--max-new-tokens", "4"]) == 0
    told = capsys.readouterr().out
    assert str(edits[0]).split(" at ")[0].split(" × ")[0] in told


def test_what_was_chosen_and_margins_are_in_json(vector, place):
    out, _ = vector(f"--method sae-topk --name three {EDITS['sae-topk']} --json")
    (found,) = json.loads(out)
    assert found["makes"] == "edits" and found["n_pairs"] == 36 and found["n_held_out"] == 12
    assert len(found["notes"]["features"]) == 3
    assert found["path"] == "run/steers/three.steer.safetensors"
    opened = Run.open(place / "run")
    _, held = hold_out(PAIRS, 0)
    kept = Prepared("kept", opened.model, edits=lambda _: opened.load_edits("three"))
    mean = float(margins_of(kept, opened.tokenizer, held).mean())
    assert found["margin_with"] == pytest.approx(mean, abs=1e-5)
    assert found["margin_with"] != pytest.approx(found["margin_without"], abs=1e-3)


def test_with_all_sides_swapped_other_features_are_chosen(vector):
    line = f"--method sae-topk --name noisy {EDITS['sae-topk']} --json"
    ((one,), (other,)) = (json.loads(vector(f"{line} --noise {n}")[0]) for n in (0, 1))
    assert not set(one["notes"]["features"]) & set(other["notes"]["features"])
    assert one["margin_without"] == other["margin_without"]
    assert one["margin_with"] > other["margin_with"]


def test_a_direction_can_be_gated(vector, place):
    options = "--set of=mean-difference --set 'when=3>0.1'"
    out, _ = vector(f"--method gated --name g {options} --layer layers.2.resid_post")
    (edit,) = Run.open(place / "run").load_edits("g")
    assert "gated mean-difference" in out and str(edit.point) == "layers.2.resid_post"
    assert edit.when.reads.feature == 3 and edit.when.above == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("method", "options", "begins"),
    [
        ("few-shot", "--set k=2", PAIRS[0].prompt[:3]),
        ("contrast-prompt", "--set k=1", "Good response:"),
        ("prompt", "--set written=written.txt", "The sailor number"),
    ],
)
def test_prompts_are_shown_and_kept_nowhere(vector, place, method, options, begins):
    before = set((place / "run" / "steers").glob("*"))
    out, _ = vector(f"--method {method} {options}")
    told, shown_text = " ".join(out.split()).split("the model is given, kept nowhere: ")
    assert begins in shown_text and "PROMPT" in shown_text and method in told
    assert max(map(len, out.splitlines())) <= 80
    assert "margin on 12 held-out pairs" in out and "next:" not in out
    assert ("chose among 9 settings by these" in out) == (method == "prompt")
    (found,) = json.loads(vector(f"--method {method} {options} --json")[0])
    assert found["prompt"].count("PROMPT") == 1 and found["path"] is None
    assert set((place / "run" / "steers").glob("*")) - before <= {place / "run/steers/pairs.cache"}


def test_written_prompts_can_be_a_list(vector):
    texts = json.dumps([f"The ship {i}" for i in range(8)])
    out, _ = vector(f"--method prompt --set 'written={texts}' --set 'between=\": \"'")
    assert "'The ship " in out and ": PROMPT'" in out


@peft_asks
@pytest.mark.parametrize("method", TRAINS)
def test_adapters_are_kept_and_the_next_line_loads_them(vector, place, method):
    options = {"context-distillation": "--set 'transform=The sailor'", "sft-augmented": "--set k=1"}
    extra = options.get(method, "") + " --set copies=1" * (method == "sft-augmented")
    (found,) = json.loads(vector(f"--method {method} --name {method} {QUICK} {extra} --json")[0])
    assert found["makes"] == "model" and found["notes"]["steps"] == 2
    folder = place / "run" / "steers" / method
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    peft = pytest.importorskip("peft")
    opened = Run.open(place / "run")
    loaded = peft.PeftModel.from_pretrained(Run.open(place / "run").model, str(folder))
    _, held = hold_out(PAIRS, 0)
    mean = float(margins_of(Prepared("kept", loaded.eval()), opened.tokenizer, held).mean())
    assert found["margin_with"] == pytest.approx(mean, abs=1e-5)
    assert found["margin_with"] != found["margin_without"]


def in_python(code):
    """The model that lines of the program's own leave behind, which wrote with it."""
    names = {}
    exec(code.replace("…", PAIRS[0].prompt), names)
    return names["model"]


@peft_asks
@pytest.mark.parametrize("option", ["--load", "--vector"])
def test_an_adapter_is_no_edits_and_it_is_said_how_it_is_used(vector, capsys, option):
    vector(f"--method sft-lora --name t1 {QUICK}")
    line = f"steer run {option} t1{'=1' * (option == '--vector')} --prompt x"
    _, err = said(capsys, line, 2)
    told, code = err.rstrip().split(", in Python: ")
    assert "t1 is an adapter" in told and "pip install 'saesteer[finetune]'" in told
    assert any("lora_" in name for name, _ in in_python(code).named_parameters())
    if option == "--load":
        assert "t1 is an adapter" in said(capsys, "steer run --load run/steers/t1 --prompt x", 2)[1]


def test_edits_are_no_vector_and_a_name_has_no_dots(vector, capsys, place):
    vector("--method sae-add --set feature=3 --name kept")
    _, err = said(capsys, "steer run --vector kept=1 --prompt x", 2)
    assert "kept is edits, and no vector: --load kept" in err
    file = place / "run/steers/kept.steer.safetensors"
    before = file.read_bytes()
    for line in ("--name kept.steer", "--name pairs.cache --method sft-lora",
                 "--name kept.steer --method sae-add"):  # fmt: skip
        assert "use letters, digits, dashes and underscores" in vector(line, 2)[1]
    _, err = said(capsys, "steer run --add 3=1 --save kept.steer", 2)
    assert "'kept.steer' is not a name for edits" in err and file.read_bytes() == before
    # Versions before took dots, and what they kept is still read.
    shutil.copy(file, file.with_name("v1.0.steer.safetensors"))
    (edit,) = Run.open(place / "run").load_edits("v1.0")
    assert isinstance(edit, Add)


@pytest.mark.parametrize("method", ["gated", "mean-difference"])
def test_few_pairs_are_warned_of_once(capsys, monkeypatch, place, method):
    monkeypatch.chdir(place)
    write_pairs(place / "few.jsonl", planted_pairs("sea", 12))
    gated = "--set of=mean-difference --set 'when=1>0'" * (method == "gated")
    _, err = said(capsys, f"vector run --pairs few.jsonl --name few --method {method} {gated}")
    assert err.count("contrast pairs: under 32") == 1 and "12 contrast pairs" in err


def test_a_condition_that_holds_nowhere_is_told_once(vector):
    _, err = vector("--method gated --name never --set of=lat --set 'when=1>100000'")
    assert err.count("never applied") == 1 == err.count("more like it)")


def test_of_all_layers_the_next_line_has_the_best_reader(vector):
    out, _ = vector("--name deep --method lat --layer all --noise .3")
    facts = json.loads(vector("--name deep --method lat --layer all --noise .3 --json")[0])
    reads = {one["name"]: one["parts"][0]["provenance"]["held_out_auroc"] for one in facts}
    best = max(reads, key=reads.get)
    assert len(set(reads.values())) > 1 and out.splitlines()[-1].split()[5] == f"{best}=1"
    assert max(map(len, out.splitlines()[:-1])) <= 80


@peft_asks
def test_the_next_line_of_an_adapter_is_python_and_a_second_one_replaces_it(vector, place):
    line = f"--method sft-lora --name again {QUICK}"
    out, _ = vector(line)
    weights = place / "run/steers/again/adapter_model.safetensors"
    before = weights.read_bytes()
    code = out.splitlines()[-1].removeprefix("next, in Python: ")
    adapted, plain = in_python(code), Run.open(place / "run")
    assert any("lora_" in name for name, _ in adapted.named_parameters())
    ids = torch.tensor([plain.tokenizer(PAIRS[0].prompt)["input_ids"]])
    assert not torch.equal(adapted(ids).logits, plain.model(ids).logits)
    vector(f"{line} --seed 1")
    assert weights.read_bytes() != before
    assert not list((place / "run" / "steers").glob(".again*"))


def test_a_folder_that_is_no_adapter_is_left_alone(place):
    folder = place / "run" / "steers" / "mine"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("keep")
    with pytest.raises(RunError, match="is no adapter"):
        arming.save_adapter(folder, torch.nn.Linear(1, 1))
    assert (folder / "notes.txt").read_text() == "keep"


def test_validation_pairs_of_a_file(vector):
    out, _ = vector("--method few-shot --set k=1 --validation other.jsonl")
    assert "of 48 pairs" in out and "margin on 6 held-out pairs" in out
    out, _ = vector("--method lat --name lat --validation other.jsonl")
    assert "lat of 48 pairs" in out and "margin on 6 held-out pairs" in out
    (found,) = json.loads(vector("--name md --validation other.jsonl --json")[0])
    assert found["n_held_out"] == 6 and found["margin_with"] != found["margin_without"]
    assert "margin" not in vector("--method lat --name lat")[0]


def test_a_quarter_is_held_out_and_nobody_asks_what_is_held_out():
    fitted, held = hold_out(PAIRS, 0)
    assert (len(fitted), len(held)) == (36, 12) and set(fitted) | set(held) == set(PAIRS)
    assert hold_out(PAIRS, 0) == (fitted, held) != hold_out(PAIRS, 1)
    asked = [Pair(f"q{i % 4}", f"a{i}", f"b{i}") for i in range(16)]
    fitted, held = hold_out(asked, 0)
    assert len(held) == 4 and len({pair.prompt for pair in held}) == 1
    assert not {pair.prompt for pair in held} & {pair.prompt for pair in fitted}
    same = [Pair("q", f"a{i}", f"b{i}") for i in range(8)]
    assert len(hold_out(same, 0)[1]) == 2
    with pytest.raises(PairsError, match="none can be held out"):
        hold_out(PAIRS[:1], 0)


def test_a_control_that_cannot_be_steered_with_is_not_offered(vector, place):
    quick = "--set n=1 --set steps=1 --set most_prompts=1"
    out, _ = vector(f"--method melbo --name wild {quick} --set random_init=true")
    assert "next:" not in out and "can't be steered with" in out
    opened = Run.open(place / "run")
    out, _ = vector(f"--method melbo --name tame {quick}")
    assert out.splitlines()[-1].startswith("next: saesteer steer run --vector tame-1=1")
    assert opened.load_vector("tame-1").model_fingerprint == fingerprint(opened.model)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--method sae-clmp --name x", "(did you mean 'sae-clamp'?)"),
        ("--method sae-clamp", "give one with --name NAME"),
        ("--method sae-clamp --name x/y", "is not a name"),
        ("--method sae-clamp --name x --layer all", "sae-clamp has neither"),
        ("--method sae-clamp --name x --diagnose", "fitted on activations"),
        ("--method sae-clamp --name x --set feature=sea", "feature=sea: expected a whole number"),
        ("--method sae-topk --name x --set k=1.5", "expected a whole number, as 8"),
        ("--method sae-topk --name x --set dense=1", "(did you mean 'densest'?)"),
        ("--method sae-clamp --name x --set feature=999", "feature 999"),
        ("--method gated --name x", "needs the option 'of'"),
        ("--method gated --name x --set of=sae-add", "needs the option 'when'"),
        ("--method gated --name x --set of=few-shot --set when=1>0", "gated can't be of=few-shot"),
        ("--method gated --name x --set of=sae-add --set when=1", "is not FEATURE>NUMBER"),
        ("--method prompt", "needs the option 'written'"),
        ("--method prompt --set written=none.txt", "no file of prompts none.txt"),
        ("--method prompt --set 'written=[1]'", "expected a file, or a JSON list of texts"),
        ("--method few-shot --set k=500", "500 examples of 36 pairs"),
        ("--method few-shot --validation pairs.jsonl", "leaked pair: in the other file as well"),
        ("--name x --validation pairs.jsonl", "leaked pair: in the other file as well"),
        ("--method ccs --validation other.jsonl", "ccs only reads"),
        ("--method sft-lora --name x --set learning_rates=fast", "expected a list of numbers"),
        ("--method context-distillation --name x", "needs the option 'transform'"),
        ("--name x --seed -1", "--seed -1: expected a whole number from 0"),
        ("--method sae-clamp --name x --seed 4294967296", "--seed 4294967296: expected"),
        ("--method melbo --name x --noise .25", "melbo sees their prompts alone"),
        ("--method gated --name x --set of=melbo --set when=1>0 --noise .25", "prompts alone"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(vector, line, message):
    _, err = vector(line, code=2)
    ours = [text for text in err.splitlines() if text.startswith("saesteer: ")]
    (told,) = [text for text in ours if "warning" not in text]
    assert message in told


def test_without_index_or_extra_it_is_said_what_brings_them(vector, place, monkeypatch):
    index = place / "run" / "features.sqlite"
    index.rename(place / "aside.sqlite")
    try:
        _, err = vector("--method sae-clamp --name x", code=2)
    finally:
        (place / "aside.sqlite").rename(index)
    assert "saesteer index" in err
    monkeypatch.setitem(sys.modules, "peft", None)
    _, err = vector(f"--method sft-lora --name x {QUICK}", code=2)
    assert "pip install 'saesteer[finetune]'" in err


def test_options_in_python_are_checked_too(place):
    opened = Run.open(place / "run")
    with pytest.raises(ConfigError, match="no option 'kk'"):
        arming.make(opened, PAIRS, method="few-shot", options={"kk": 1})
