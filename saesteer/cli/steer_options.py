"""What `saesteer steer` is told on the command line, made into edits, positions and prompts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saesteer.errors import FeatureError, SteeringError, TextError
from saesteer.named import Name
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.core.generate import Prompt
    from saesteer.steering.conditions import When
    from saesteer.steering.edits import Edit
    from saesteer.steering.positions import Positions
    from saesteer.steering.schedules import Schedule

ROLES = ("system", "user", "assistant")
# Options that make edits, and how their values are written.
_FORMS = {
    "clamp": "FEATURE=STRENGTH, such as 12=8x",
    "add": "FEATURE=STRENGTH, such as 12=8x",
    "vector": "NAME=STRENGTH, such as calm=2",
    "project": "DIRECTION=NUMBER, such as 12=0",
    "rotate": "FIRST,SECOND=ANGLE, such as 12,40=30deg",
}
_CONDITION = re.compile(r"\s*([0-9]+)\s*>\s*(\S+)\s*")


@dataclass(frozen=True)
class Given:
    """What the edits are, as it was written, KEY=VALUE each; see the command's help.

    force: take directions that were fitted on other weights.
    """

    clamp: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    vector: tuple[str, ...] = ()
    project: tuple[str, ...] = ()
    rotate: tuple[str, ...] = ()
    force: bool = False

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _FORMS)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name in _FORMS for value in getattr(self, name))

    @property
    def first_feature(self) -> int | None:
        """The feature that is named first, of the kinds of edits in their order."""
        names: list[Name] = []
        for option in ("clamp", "add"):
            names += [_feature(key) for key, _ in settings(getattr(self, option), option)]
        names += [_direction(key) for key, _ in settings(self.project, "project")]
        names += [name for key, _ in settings(self.rotate, "rotate") for name in _plane(key)]
        return next((name for name in names if isinstance(name, int)), None)

    def edits(self, run: Run) -> "list[Edit]":
        """Clamps, then additions, vectors, projections, rotations."""
        return run.edits(
            clamp={_feature(key): value for key, value in settings(self.clamp, "clamp")},
            add={_feature(key): value for key, value in settings(self.add, "add")},
            vector=dict(settings(self.vector, "vector")),
            project={_direction(key): value for key, value in settings(self.project, "project")},
            rotate={_plane(key): value for key, value in settings(self.rotate, "rotate")},
            force=self.force,
        )


@dataclass(frozen=True)
class Scoped:
    """Where, when and how much, for all edits of a command line; see its help."""

    where: Literal["both", "prompt", "generated"] = "both"
    first: int | None = None
    last: int | None = None
    after: str | None = None
    every: int = 1
    special: bool = False
    condition: str | None = None
    lasting: Literal["while", "from", "until"] = "while"
    fade: str | None = None
    keep_norm: bool = False

    def check(self, edits: Given, loaded: Sequence[str]) -> None:
        """Refuse what would have no effect."""
        if self.lasting != "while" and self.condition is None:
            raise SteeringError(
                f"--lasting {self.lasting} is about a condition; give one, --if '88>2.5'"
            )
        if not edits and loaded and self != Scoped():
            raise SteeringError(
                "--load brings its own positions and conditions; give --where, --if and the like "
                "with --clamp, --add and their like, or save the edits anew"
            )

    def positions(self) -> "Positions":
        """The tokens that are chosen. SteeringError where that is none."""
        from saesteer.steering.positions import Positions

        return Positions(
            prompt=self.where != "generated",
            generated=self.where != "prompt",
            special=self.special,
            first=self.first,
            last=self.last,
            after=self.after,
            every=self.every,
        )

    def applied(self, edits: "Sequence[Edit]", run: Run) -> "list[Edit]":
        """The edits with what was given. SteeringError for positions beside an edit's own."""
        from saesteer.steering.positions import Positions

        about: dict[str, Any] = {"keep_norm": True} if self.keep_norm else {}
        if (where := self.positions()) != Positions():
            for edit in edits:
                if edit.where != Positions():
                    raise SteeringError(
                        f"{edit} brings its own positions ({edit.where}), as its method is meant; "
                        "leave out --where, --first, --last, --after, --every and --special"
                    )
            about["where"] = where
        if self.condition is not None:
            about["when"] = self.parsed_when(self.condition, run)
        if self.fade is not None:
            about["schedule"] = schedule(self.fade)
        return [replace(edit, **about) for edit in edits]

    def parsed_when(self, condition: str, run: Run) -> "When":
        """The condition that FEATURE>NUMBER is. SteeringError where it isn't of that form."""
        from saesteer.steering.conditions import Feature, When

        match = _CONDITION.fullmatch(condition)
        if match is None:
            raise SteeringError(
                f"--if {condition!r} is not FEATURE>NUMBER; write it in quotes (a shell takes > "
                "for a file), --if '88>2.5' or --if '88>0.5x'"
            )
        # As for --add: 0.5x is half of the feature's highest activation in the index.
        (edit,) = run.edits(add={int(match[1]): match[2]})
        reads = Feature(run.sae, int(match[1]))
        return When(reads, above=float(getattr(edit, "strength")), lasting=self.lasting)  # noqa: B009


def schedule(text: str) -> "Schedule":
    """linear:40 or decay:20. SteeringError where it is neither."""
    from saesteer.steering.schedules import Decay, Linear

    kind, _, tokens = text.partition(":")
    if kind == "linear" and tokens.isdecimal() and int(tokens) > 0:
        return Linear(over=int(tokens))
    try:
        if kind == "decay":
            return Decay(float(tokens))
    except ValueError:
        pass
    raise SteeringError(
        f"--fade {text!r} is not linear:TOKENS or decay:TOKENS; linear:40 falls to nothing over 40 "
        "generated tokens, decay:20 halves every 20"
    )


def multiples(text: str) -> list[float]:
    """0,2,4,8 → numbers, in the order given. SteeringError where one is none."""
    try:
        found = [float(part.strip().lower().removesuffix("x")) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(abs(value) < float("inf") for value in found):
        raise SteeringError(f"--sweep {text!r} is no list of numbers, such as 0,2,4,8,16")
    return list(dict.fromkeys(found))


def settings(values: Sequence[str], option: str) -> list[tuple[str, str]]:
    """KEY=VALUE each, as pairs. SteeringError for another form, or a key given twice."""
    found: list[tuple[str, str]] = []
    for value in values:
        key, equals, strength = value.rpartition("=")
        if not (key and equals and strength):
            raise SteeringError(f"--{option} {value!r} is not {_FORMS[option]}")
        key = str(int(key)) if key.isdecimal() and option != "vector" else key
        if key in (k for k, _ in found):
            raise SteeringError(f"--{option} {key} is given twice; give it one value")
        found.append((key, strength))
    return found


def _feature(text: str) -> int:
    if not text.isdecimal():
        raise FeatureError(f"{text!r} is not a feature's number; saesteer search finds one")
    return int(text)


def _direction(text: str) -> Name:
    return int(text) if text.isdecimal() else text


def _plane(text: str) -> tuple[Name, Name]:
    first, comma, second = text.partition(",")
    if not (first and comma and second) or "," in second:
        raise SteeringError(f"--rotate {text!r}: a plane is two directions, such as 12,40=30deg")
    return _direction(first), _direction(second)


def chat(
    run: Run, prompt: str, *, system: str | None, roles: Sequence[str]
) -> "tuple[Prompt, Positions | None]":
    """A user's turn as the chat template writes it, and the positions of some roles in it.

    roles: empty for no positions.

    Raises:
        TextError: the tokenizer has no template, or the template refuses the turns.
        SteeringError: no turn has one of the roles.
    """
    from jinja2 import TemplateError

    from saesteer.steering.roles import of_roles

    tokenizer: Any = run.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"the tokenizer of {run.config.model.id} has no chat template, so --chat can't be "
            "used; leave it out, or take a model that was trained for chats"
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        where = of_roles(tokenizer, messages, roles) if roles else None
    except TemplateError as error:
        raise TextError(
            f"the chat template of {run.config.model.id} refuses these turns ({error}); try it "
            "without --system"
        ) from error
    return list(ids), where


def roles_of(text: str | None) -> tuple[str, ...]:
    """user,assistant → names. SteeringError for one that is none."""
    found = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and (not found or set(found) - set(ROLES)):
        raise SteeringError(f"--roles {text!r}: name some of {', '.join(ROLES)}, a comma between")
    return found


def narrowed(edit: "Edit", where: "Positions | None") -> "Edit":
    """The edit for those of its own positions that are in `where`, of one chat."""
    if where is None:
        return edit
    if edit.where.spans is not None:
        raise SteeringError(
            f"{edit} is for certain positions ({edit.where}), which --roles can't narrow; "
            "leave --roles out"
        )
    generated = edit.where.generated and where.generated
    if not (edit.where.prompt or generated):
        raise SteeringError(
            "--where generated chooses the assistant's tokens, and --roles leaves them out; add "
            "assistant to --roles, or leave one of the two out"
        )
    return replace(edit, where=replace(edit.where, spans=where.spans, generated=generated))


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, or of a .jsonl file each line's "prompt". TextError for what is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise TextError(f"no file of prompts {path}; give one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            found = json.loads(line)["prompt"]
            if not isinstance(found, str):
                raise TypeError
            prompts.append(found)
        except (json.JSONDecodeError, KeyError, TypeError):
            raise TextError(
                f'{path} line {number} is not a JSON object with a "prompt"; mend the line'
            ) from None
    if not prompts:
        raise TextError(f"{path} holds no prompt; give one a line")
    return prompts
