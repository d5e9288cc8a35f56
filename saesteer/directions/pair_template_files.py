"""Files of templates for contrast pairs: TOML or JSON."""

import json
import tomllib
from pathlib import Path
from typing import Any

from saesteer.directions.pair_templates import Template, Templates, Value, fields
from saesteer.directions.pairs import KEYS
from saesteer.errors import PairsError, did_you_mean


def read_templates(path: str | Path) -> Templates:
    """Read a TOML or JSON file of templates.

        choices = false                         # true: A/B questions
        [[templates]]
        prompt = "{name} saw the {place}. {name} felt"
        chosen = " {mood}."
        rejected = " {mood}."
        [slots]
        name = ["Tom", "Lily"]                  # the same on both sides
        mood = [["happy", "sad"], ["glad", "gloomy"]]   # chosen, rejected
        place = { file = "places.txt" }         # a line each, or a JSON array of texts

    One template can stand without its [[templates]]; a {{ is a brace.

    Raises:
        PairsError: missing or no TOML or JSON; an unknown key; a slot without values or that no
            template uses; a prompt with a slot that differs between the sides.
    """
    path = Path(path)
    value = _parsed(path)
    if not isinstance(value, dict):
        raise PairsError(f"{path}: expected a table with prompt, chosen, rejected and slots")
    rows = value.get("templates", [{key: value[key] for key in KEYS if key in value}])
    known = (
        ("templates", "slots", "choices") if "templates" in value else (*KEYS, "slots", "choices")
    )
    for key in value:
        if key not in known:
            raise PairsError(f"{path}: unknown key {key!r}{did_you_mean(key, known)}; use {known}")
    if not isinstance(rows, list) or not rows:
        raise PairsError(f"{path}: 'templates' is no list of tables; write [[templates]]")
    templates = tuple(_template(row, f"{path}, template {n}") for n, row in enumerate(rows, 1))
    slots = value.get("slots", {})
    if not isinstance(slots, dict):
        raise PairsError(f"{path}: 'slots' is no table; write [slots] and a list for each")
    choices = value.get("choices", False)
    if not isinstance(choices, bool):
        raise PairsError(f"{path}: 'choices' is {choices!r}; expected true or false")
    values = {name: _values(given, name, path) for name, given in slots.items()}
    made = Templates(templates, values, choices)
    _check(made, str(path))
    return made


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(
            f"the templates {path} can't be read ({getattr(error, 'strerror', None) or error}); "
            "name a .toml or .json file"
        ) from error
    try:
        return json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        raise PairsError(f"{path} is no {kind}: {error}") from error


def _template(row: Any, where: str) -> Template:
    if not isinstance(row, dict):
        raise PairsError(f"{where} is no table with prompt, chosen and rejected")
    for key in row:
        if key not in KEYS:
            raise PairsError(f"{where}: unknown key {key!r}{did_you_mean(key, KEYS)}; use {KEYS}")
    for key in KEYS:
        if not isinstance(row.get(key), str):
            raise PairsError(f"{where}: {key!r} is missing or no string")
        try:
            fields(row[key])
        except ValueError as error:
            raise PairsError(
                f"{where}: {key!r} can't be read ({error}); a slot is a plain {{name}}, and a "
                "brace is written twice"
            ) from error
    return Template(**row)


def _values(given: Any, name: str, path: Path) -> tuple[Value, ...]:
    where = f"{path}, slot {name!r}"
    if isinstance(given, dict):
        if set(given) != {"file"} or not isinstance(given["file"], str):
            raise PairsError(f'{where}: expected a list, or {{ file = "values.txt" }}')
        given = _listed(path.parent / given["file"], where)
    if not isinstance(given, list) or not given:
        raise PairsError(f"{where} has no values; expected a list of texts")
    values: list[Value] = []
    for value in given:
        if isinstance(value, str):
            values.append((value, value))
        elif (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(text, str) for text in value)
        ):
            values.append((value[0], value[1]))
        else:
            raise PairsError(f"{where}: {value!r} is no text and no [chosen, rejected]")
    return tuple(dict.fromkeys(values))


def _listed(path: Path, where: str) -> Any:
    if path.suffix.lower() == ".json":
        return _parsed(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"{where}: {path} can't be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _check(made: Templates, where: str) -> None:
    used = {name for template in made.templates for name in template.slots()}
    for name in sorted(used - set(made.slots)):
        raise PairsError(
            f"{where}: a template has the slot {name!r}, but [slots] has no values for it"
            f"{did_you_mean(name, made.slots)}"
        )
    for name in sorted(set(made.slots) - used):
        raise PairsError(f"{where}: no template uses the slot {name!r}{did_you_mean(name, used)}")
    for template in made.templates:
        for name in fields(template.prompt):
            if any(chosen != rejected for chosen, rejected in made.slots[name]):
                raise PairsError(
                    f"{where}: the slot {name!r} differs between the sides, so it can't stand in "
                    "a prompt, which both share; give its values as single texts"
                )
