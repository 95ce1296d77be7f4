"""Prompts of a subject in contexts: templates with a place for the subject, bundled or from a file."""

from __future__ import annotations

from pathlib import Path

from unidad.errors import SettingsError, did_you_mean

FOLDER = Path(__file__).resolve().parent / "assets" / "prompts"
PLACE = "{}"
ARTICLES = ("a ", "an ", "the ")


def bundled_templates() -> list[str]:
    """Names of the bundled lists."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def read_templates(name: str) -> list[str]:
    """Templates of a bundled list or of a text file, one a line, such as "a {} in the snow"; empty lines are passed over.

    Raises:
        SettingsError: no such list or file, no line in it, or a line without exactly one {}.
    """
    path = FOLDER / f"{name}.txt" if name in bundled_templates() else Path(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        known = bundled_templates()
        raise SettingsError(
            f"'prompts' is '{name}', which is no readable file and no bundled list.{did_you_mean(name, known)} Bundled: {', '.join(known)}."
        ) from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in found:
        if line.count(PLACE) != 1:
            raise SettingsError(
                f"Line {number} of '{path}' must have {PLACE} once, where the subject goes: 'a {PLACE} in the snow'."
            )
    if not found:
        raise SettingsError(f"'{path}' holds no prompt. Give lines such as 'a {PLACE} in the snow'.")
    return [line for _, line in found]


def in_contexts(templates: list[str], prompt: str) -> list[str]:
    """Each template with the subject of a prompt in its place: "a prt cat" in "a {} in the snow" is "a prt cat in the snow"."""
    subject = prompt
    for article in ARTICLES:
        subject = subject.removeprefix(article)
    return [template.replace(PLACE, subject) for template in templates]
