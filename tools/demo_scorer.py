"""Train a scorer on the demo's world, and find out whether it sees errors in captions and companions.

Clips of all attributes are written, those of training and those held out, and `transpixeler scorer` is trained on them.
Then each held-out clip is scored against its own caption and against that with another colour or direction, and its
RGB against its own companion and another clip's. Prints how often the right one of all is found, how often the wrong
one scores lower, and one line of JSON. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tooling import run
from torch import Tensor

from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.data.encode import encode_missing
from transpixeler.data.loader import Assembler
from transpixeler.demo.scenes import COLORS, DIRECTIONS, Format, scenes
from transpixeler.demo.write import write_demo, write_pairs
from transpixeler.files import whole
from transpixeler.models.family import caption_fields, open_model
from transpixeler.parallel.runtime import Runtime, running
from transpixeler.sampling.texts import encode_prompts
from transpixeler.scoring.file import STATE_FILE, text_field
from transpixeler.scoring.retrieval import embed
from transpixeler.scoring.scores import Scores
from transpixeler.scoring.training import EVAL_FILE, FOLDER, train_scorer

WORDS = {"color": tuple(COLORS), "direction": tuple(DIRECTIONS)}
SQUARE = Format(64, 64, 17, Fraction(16))
CLIPS = {"train": 960, "eval": 60}  # the held-out ones are of 56 combinations that no training clip has
KEYS = ("data.frames=[17]", "scorer.width=128", "scorer.steps=1500", "scorer.global_batch=64")


def prepared(out: Path, overrides: Sequence[str]) -> Config:
    """Write the demo and the clips, if they are not there; return the config that trains on them."""
    if not (out / "demo").exists():
        write_demo(out / "demo", train_clips=1, eval_clips=1)
    for name, count in CLIPS.items():
        if not (out / name).exists():
            with whole(out / name) as unfinished:
                write_pairs(unfinished, scenes(count, formats=(SQUARE,), held_out=name == "eval", seed=1))
    places = (f"data.{name}={(out / name).resolve()}" for name in CLIPS)
    return loading.load(
        out / "demo/config.yaml",
        [f"output_dir={out.resolve()}", f"data.cache_dir={(out / 'cache').resolve()}", *places, *KEYS, *overrides],
    )


def other_word(caption: str, words: Sequence[str]) -> str:
    """Return the caption with the word of this kind that comes next in the list."""
    parts = caption.replace(",", " ,").split()
    place = next(i for i, part in enumerate(parts) if part in words)
    parts[place] = words[(words.index(parts[place]) + 1) % len(words)]
    return " ".join(parts).replace(" ,", ",")


def measured(right: Tensor, wrong: Tensor) -> dict[str, float]:
    """Compare cosines, one a clip."""
    return {"found": float((right > wrong).float().mean()), "lower_by": float((right - wrong).mean())}


@torch.no_grad()
def errors_seen(config: Config, file: Path, runtime: Runtime) -> dict[str, Mapping[str, float]]:
    """Return for each kind of error how often it is seen in the held-out clips."""
    config = replace(config, data=replace(config.data, train=()))
    model = open_model(config.model)
    data = encode_missing(config, model, runtime).eval
    scores = Scores(str(file), data.streams, config, model, runtime.device)
    assembler = Assembler(data, patch=model.geometry.patch, fields=caption_fields(model.fields))
    text = text_field(model).name
    batches = [assembler.batch(np.array([number]), slots=range(1)) for number in range(len(data.items))]
    captions, rgb, aux, *_ = torch.cat([embed(scores.scorer, batch, text, runtime.device) for batch in batches], 1)
    right, found = (rgb * captions).sum(-1), {}
    for kind, words in WORDS.items():
        changed = [other_word(item.caption, words) for item in data.items]
        texts = encode_prompts(config, changed, model, runtime).by_prompt
        wrong = torch.cat([scores.scorer.embed_caption(texts[one][text][None]) for one in changed])
        found[f"another {kind}"] = measured(right, (rgb * wrong).sum(-1))
    found["another clip's companion"] = measured((rgb * aux).sum(-1), (rgb * aux.roll(1, 0)).sum(-1))
    return found


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="demo_scorer.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", help="a folder for the demo, the clips and the scorer")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, such as scorer.steps=500")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is no folder; give one to write to")
    config = prepared(out, args.overrides)
    with running(device="cpu") as runtime:
        file = train_scorer(config, runtime, resume=(out / FOLDER / STATE_FILE).exists())
        found = errors_seen(config, file, runtime)
    for kind, values in found.items():
        print(f"{kind}: scores lower for {values['found']:.0%} of the clips, by {values['lower_by']:.3f} on average")
    print(json.dumps(json.loads((out / FOLDER / EVAL_FILE).read_text()) | {"errors": found}))


if __name__ == "__main__":
    raise SystemExit(run("demo_scorer", main))
