"""What a prompt, a caption or a name says is text wherever it is shown: in the card, in both pages, in a terminal."""

from __future__ import annotations

import html.parser
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.publishing.test_report import write_run
from tests.support.saves import TERMS, save_adapter
from transpixeler import cli
from transpixeler.data.media.write import write_png
from transpixeler.publishing import compare, hub, markdown, report, sheet_page
from transpixeler.sampling.files import write_sample

ATTACKS = (
    r"\[x\](https://evil.example)",
    "[x](https://evil.example)",
    "![x](https://evil.example/track.png)",
    "see https://evil.example now",
    "see www.evil.example now",
    "mail me@evil.example",
    "<https://evil.example>",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "<!-- data --> <!-- cards -->",
    "a`b ``c`` [x](https://evil.example) `",
    "# a\n\n## b",
    "1. one",
    "- one",
    "> quoted",
    "| a | b |",
    "*bold* _it_ **b** ~~s~~ $x$",
    "&lt;b&gt; &#91;x&#93;",
    "a\\",
    "--- \x1b[2J \u202e \0",
)


def spans(line: str) -> list[str]:
    """The code spans of a line of Markdown, by CommonMark's rule: a run of backticks closes one of its own length."""
    found, i = [], 0
    while i < len(line):
        if line[i] != "`":
            i += 1
            continue
        length = len(line[i:]) - len(line[i:].lstrip("`"))
        end = i + length
        while end < len(line):
            if line[end] != "`":
                end += 1
                continue
            run = len(line[end:]) - len(line[end:].lstrip("`"))
            if run == length:
                break
            end += run
        found.append(line[i + length : end])
        i = end + length
    return found


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_prompt_is_text_in_the_card(attack: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, samples=False)
    rgb = np.zeros((1, 16, 16, 3), np.uint8)
    how = {"fps": Fraction(8), "formats": (), "alpha_mode": "straight"}
    write_sample(run / "samples/step00000003/000", {"rgb": rgb}, facts={"prompt": attack}, **how)
    save_adapter(run / "step30")
    text = hub.pack(str(run), TERMS).files["README.md"].decode()
    (shown,) = [line.removeprefix("> ") for line in text.splitlines() if line.startswith("> ")]
    (inside,) = spans(shown)
    line = " ".join("".join("\ufffd" if c in "\x1b\u202e\0" else c for c in attack).split())
    assert inside.strip(" ") == line.strip(" ")
    assert shown.startswith("`") and shown.endswith("`"), "all of it is code"


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_rendered_card_shows_a_prompt_and_a_value_as_they_are(attack: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    renderer = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for text in (f"> {markdown.inline(attack)}", f"| | |\n|---|---|\n| figure | {markdown.cell(attack)} |"):
        page = _Page(renderer.render(text))
        assert set(page.tags) <= {"blockquote", "p", "code", "table", "thead", "tbody", "tr", "th", "td"}
        assert markdown.line(attack) in "".join(page.text).replace("figure", "")


def test_a_plain_prompt_stays_as_it_is() -> None:
    prompt = "a red ball drifts left, half transparent (slowly) at 50% – the artist’s self_attn.q"
    assert markdown.inline(prompt) == markdown.cell(prompt) == prompt
    assert markdown.cell("a|b") == r"`a\|b`" and markdown.cell("1.5 h of steps") == "1.5 h of steps"


class _Page(html.parser.HTMLParser):
    """What a browser would make of a page: its tags and attributes, and the text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_captions_and_names_are_text_on_the_data_sets_page(tmp_path: Path) -> None:
    folder = tmp_path / "a<b onclick=x>"
    for number, attack in enumerate(ATTACKS):
        stem = f"{number:02}<img src=y onerror=alert(1)>"
        write_png(folder / f"{stem}.png", np.full((16, 16, 3), 90, np.uint8))
        write_png(folder / f"{stem}_seg.png", np.full((16, 16, 3), 255 * (number % 2), np.uint8))
        (folder / f"{stem}.txt").write_text(attack.replace("\n", " "))
    words = ["data.sizes=[[16, 16, 1]]", "--out", str(tmp_path / "page.html")]
    assert cli.main(["inspect", str(folder), *words]) in (0, 2)
    page = _Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "onerror" not in page.attributes and "onclick" not in page.attributes
    assert page.tags.count("script") == 2 and page.tags.count("img") == 3 * len(ATTACKS)
    assert any("</script><script>alert(1)</script>" in text for text in page.text)


def test_prompts_are_text_in_the_pages_of_runs_and_samples(tmp_path: Path) -> None:
    rgb = np.zeros((1, 16, 16, 3), np.uint8)
    how = {"fps": Fraction(8), "formats": (), "alpha_mode": "straight"}
    made: dict[str, list[_Page]] = {}
    for name, prompts in (("plain", ("a boat",)), ("odd", ATTACKS)):
        runs = [write_run(tmp_path / name / one, steps=3, samples=False) for one in ("a", f"b{prompts[0][:9]}")]
        folders = [runs[1] / f"samples/step00000003/{number:03}" for number in range(len(prompts))]
        for folder, prompt in zip(folders, prompts):
            write_sample(folder, {"rgb": rgb}, facts={"prompt": prompt}, **how)
        pages = (report.write_report(runs[1]), compare.write_comparison(runs, tmp_path / name))
        for page in (*pages, sheet_page.write_sheet_page(runs[1], folders)):
            made.setdefault(page.name, []).append(_Page(page.read_text(encoding="utf-8")))
    assert set(made) == {"report.html", "compare.html", "sheet.html"}
    for plain, odd in made.values():
        assert odd.tags == plain.tags and odd.attributes == plain.attributes
