"""notes: what a user writes about features: names, tags, stars, remarks."""

from pathlib import Path
from typing import Annotated

import tyro

from saesteer.cli.arguments import RunFolder
from saesteer.errors import ConfigError
from saesteer.run import Run

Several = tyro.conf.UseAppendAction[tuple[str, ...]]


def notes(
    run: RunFolder,
    feature: Annotated[int | None, tyro.conf.Positional] = None,
    *,
    name: str | None = None,
    tag: Several = (),
    untag: Several = (),
    star: bool = False,
    unstar: bool = False,
    remark: str | None = None,
    export: Path | None = None,
    import_: Annotated[Path | None, tyro.conf.arg(name="import")] = None,
    force: bool = False,
) -> None:
    """Name, tag and star features, or list what was noted. Notes outlive a new index.

    Args:
        run: The run folder.
        feature: The feature's number; without one, all notes are listed.
        name: A name of your own for it; "" takes it away.
        tag: A tag to add, a single word; give it several times for several.
        untag: A tag to take away.
        star: Star it.
        unstar: Take the star away.
        remark: Text to keep with it; "" takes it away.
        export: Write all notes to this JSON file.
        import_: Take the notes of such a file in.
        force: Take them although they were written about another SAE.
    """
    from saesteer.features import notes as kept
    from saesteer.features.migrate import reading

    path = Run.open(run).index.path
    changes = bool(name is not None or tag or untag or star or unstar or remark is not None)
    if changes and feature is None:
        raise ConfigError("which feature? give its number: saesteer notes RUN 12 --tag sea")
    if star and unstar:
        raise ConfigError("--star and --unstar at once; give one of them")
    if export is not None and import_ is not None:
        raise ConfigError("--export and --import at once; give one after the other")
    if force and import_ is None:
        raise ConfigError("--force goes with --import")
    if import_ is not None:
        print(f"notes on {kept.load(path, import_, force=force)} features taken from {import_}")
    if feature is not None and changes:
        if name is not None:
            kept.rename(path, feature, name or None)
        if tag:
            kept.tag(path, feature, tag)
        if untag:
            kept.untag(path, feature, untag)
        if star or unstar:
            kept.star(path, feature, star)
        if remark is not None:
            kept.remark(path, feature, remark)
    if export is not None:
        print(f"notes on {kept.export(path, export)} features in {export}")
        return
    if feature is not None:
        Run.open(run).index.max_act(feature)  # tells a number that there is no feature of
    with reading(path) as connection:
        found = kept.read(connection, None if feature is None else [feature])
    for number in sorted(found):
        note = found[number]
        parts = ["★" if note.starred else " ", note.name or "", *(f"#{tag}" for tag in note.tags)]
        line = " ".join(part for part in parts if part)
        print(f"{number:>7} {line}{f'  {note.text}' if note.text else ''}")
    if not found:
        print("nothing noted yet; saesteer notes RUN 12 --name boats --tag sea --star")
