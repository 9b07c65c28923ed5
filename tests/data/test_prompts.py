"""A prompt file says for each video what it is made from, and a bad line is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transpixeler.config.sections import SampleConfig, UserError
from transpixeler.data.prompts import GivenFiles, Prompt, prompt_lines, read_prompts, texts_of


def lines(folder: Path, *objects: object) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in objects), encoding="utf-8")
    return str(path)


def test_a_line_of_json_says_seed_negative_size_and_files(tmp_path: Path) -> None:
    whole = {"prompt": "a red\nball\u2028drifts", "seed": 7, "negative": "", "size": [64, 48, 5], "image": "in/a.png"}
    path = lines(tmp_path, whole, "", {"prompt": "größe", "size": "32x32x1"}, {"rgb": "clip.mp4"}, {"prompt": "x"})
    first, second, third, last = prompt_lines(path, key="--prompts")
    assert (first.text, first.seed, first.negative, first.size) == (whole["prompt"], 7, "", (64, 48, 5))
    assert first.given == GivenFiles(image=str(tmp_path / "in/a.png"))  # beside the list
    assert (second.text, second.size, second.where) == ("größe", (32, 32, 1), f"{path}:3")
    assert (third.text, third.given.named) == ("", {"rgb": str(tmp_path / "clip.mp4")})
    assert last == Prompt("x")


def test_plain_text_is_a_prompt_a_line_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('\ufeffa red ball\n\n  {"prompt": "x"}  \r\n', encoding="utf-8")
    assert prompt_lines(str(tmp_path / "p.txt"), key="--prompts") == [Prompt("a red ball"), Prompt('{"prompt": "x"}')]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a red ball", "is not JSON"),
        ("[1]", "expected an object"),
        ("[" * 100_000, "is not JSON"),
        ({"promt": "x"}, "promt: unknown key; did you mean prompt?"),
        (
            {"prompt": "x", "zzz": 1},
            "zzz: unknown key; known are prompt, seed, negative, size, rgb, alpha, image, last",
        ),
        ({"seed": 3}, "prompt: must be given"),
        ({"prompt": 3}, "prompt: expected a text, found 3"),
        ({"prompt": "\ud800"}, "prompt: expected a text"),
        ({"prompt": "x", "seed": -1}, "seed: expected a whole number ≥ 0, found -1"),
        ({"prompt": "x", "seed": True}, "seed: expected a whole number ≥ 0, found true"),
        ({"prompt": "x", "seed": 1.0}, "seed: expected a whole number"),
        ({"prompt": "x", "size": [64, 64]}, "size: expected [width, height, frames], such as [832, 480, 33]"),
        ({"prompt": "x", "size": "64x64"}, "size: expected [width"),
        ({"prompt": "x", "size": [64, 64, 0]}, "size: expected [width"),
        ({"prompt": "x", "image": ""}, "image: expected the path of a file"),
        ({"prompt": "x", "image": "a\0b"}, "image: expected the path of a file"),
        ('{"prompt": "x", "prompt": "y"}', "prompt: is given twice"),
        ({"reference": "a.png", "rgb": "b.mp4"}, "reference: stands beside rgb; name each file"),
    ],
    ids=str,
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, line: object, said: str) -> None:
    path = lines(tmp_path, {"prompt": "good"}, "", line)
    with pytest.raises(UserError) as fault:
        prompt_lines(path, key="--prompts")
    assert str(fault.value).startswith(f"{path}:3: {said}")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--prompts: .*p.json is one JSON text; give .jsonl"):
        prompt_lines(str(tmp_path / "p.json"), key="--prompts")
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"--prompts: .*p.jsonl is no text in UTF-8"):
        prompt_lines(str(tmp_path / "p.jsonl"), key="--prompts")


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
def test_a_list_without_prompts_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n \n")
    with pytest.raises(UserError, match=rf"--prompts: .*{name} holds no prompt"):
        prompt_lines(str(tmp_path / name), key="--prompts")


def test_a_picture_is_no_list_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"--prompts: .*a\.png is no text in UTF-8; give \.txt or \.jsonl"):
        prompt_lines(str(tmp_path / "a.png"), key="--prompts")


def test_negative_prompts_of_lines_are_encoded_where_guidance_is_on(tmp_path: Path) -> None:
    path = lines(tmp_path, {"prompt": "a", "negative": "blurry"}, {"prompt": "b", "negative": "blurry"})
    for guidance, texts in ((5.0, ("own", "a", "b", "blurry")), (1.0, ("own", "a", "b"))):
        config = SampleConfig(prompts=("own",), prompts_file=path, guidance=guidance)
        assert texts_of(config, [(one.text, one.negative) for one in read_prompts(config)]) == texts
