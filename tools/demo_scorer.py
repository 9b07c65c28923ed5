"""Train a scorer on the demo's world, and find out whether it sees errors in captions and companions.

Clips of all attributes are written, those of training and one of each held-out caption, and `transpixeler scorer` is
trained on them. Then errors are put into captions (another colour, direction or opacity) and into held-out clips
(recoloured, mirrored along their way, played backwards), and RGB is scored against its own companion and another
clip's. Prints how often the right one of all is found, how often the wrong one scores lower, and one line of JSON. The
same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from demo_figures import true_streams
from demo_measures import HELD_OUT
from tooling import run
from torch import Tensor

from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.data.encode import encode_missing
from transpixeler.data.loader import Assembler
from transpixeler.demo.scenes import COLORS, DIRECTIONS, OPACITIES, Format, Scene, scenes
from transpixeler.demo.write import write_demo, write_pairs
from transpixeler.files import whole
from transpixeler.models.family import caption_fields, open_model
from transpixeler.parallel.runtime import Runtime, log_to_terminal, quiet_libraries, running
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.texts import encode_prompts
from transpixeler.scoring.file import STATE_FILE, text_field
from transpixeler.scoring.retrieval import embed
from transpixeler.scoring.scores import Scores
from transpixeler.scoring.training import EVAL_FILE, FOLDER, train_scorer

WORDS = {"color": tuple(COLORS), "direction": tuple(DIRECTIONS), "opacity": tuple(OPACITIES)}
SQUARE = Format(64, 64, 9, Fraction(16))
SEED = 1
CLIPS = {"train": 240, "eval": len(HELD_OUT)}  # each held-out caption once; no training clip has one of them
Streams = Mapping[str, np.ndarray]  # uint8 [F, H, W, 3] by name
KEYS = (
    *("data.frames=[9]", "scorer.width=96", "scorer.layers=2", "scorer.lr=2.0e-3"),
    *("scorer.steps=200", "scorer.warmup_steps=50", "scorer.every_steps=50", "scorer.global_batch=60"),
)


def prepared(out: Path, overrides: Sequence[str]) -> Config:
    """Write the demo and the clips, if they are not there; return the config that trains on them."""
    if not (out / "demo").exists():
        write_demo(out / "demo", train_clips=1, eval_clips=1)
    for name, count in CLIPS.items():
        if not (out / name).exists():
            with whole(out / name) as unfinished:
                write_pairs(unfinished, drawn(count, held_out=name == "eval"))
    places = (f"data.{name}={(out / name).resolve()}" for name in CLIPS)
    return loading.load(
        out / "demo/config.yaml",
        [f"output_dir={out.resolve()}", f"data.cache_dir={(out / 'cache').resolve()}", *places, *KEYS, *overrides],
    )


def drawn(count: int, *, held_out: bool) -> tuple[Scene, ...]:
    return scenes(count, formats=(SQUARE,), held_out=held_out, seed=SEED)


def other_word(caption: str, words: Sequence[str]) -> str:
    """Return the caption with the words of this kind that come next in the list."""
    found = next(word for word in words if word in caption)
    return caption.replace(found, words[(words.index(found) + 1) % len(words)])


# --- errors in clips -------------------------------------------------------------------------------------------------


def recolored(scene: Scene) -> Streams:
    """Render the scene in the next colour."""
    colors = WORDS["color"]
    other = colors[(colors.index(scene.attributes.color) + 1) % len(colors)]
    return true_streams(replace(scene, attributes=replace(scene.attributes, color=other)))


def mirrored(scene: Scene) -> Streams:
    """Mirror the scene along its way, so that it goes the other way."""
    axis = 2 if DIRECTIONS[scene.attributes.direction][0] else 1
    return {name: np.ascontiguousarray(np.flip(video, axis)) for name, video in true_streams(scene).items()}


def backwards(scene: Scene) -> Streams:
    return {name: np.ascontiguousarray(video[::-1]) for name, video in true_streams(scene).items()}


ERRORS: Mapping[str, Callable[[Scene], Streams]] = {
    "recoloured": recolored,
    "mirrored along its way": mirrored,
    "played backwards": backwards,
}


# --- measuring -------------------------------------------------------------------------------------------------------


def measured(right: Tensor, wrong: Tensor) -> dict[str, float]:
    """Compare cosines, one a clip."""
    return {"found": float((right > wrong).float().mean()), "lower_by": float((right - wrong).mean())}


@torch.no_grad()
def errors_seen(config: Config, file: Path, runtime: Runtime) -> dict[str, Mapping[str, float]]:
    """Return for each kind of error how often it is seen in the held-out clips."""
    config = replace(config, data=replace(config.data, train=()))
    model = open_model(config.model)
    data = encode_missing(config, model, runtime).eval
    scores = Scores(str(file), config, model, runtime.device)
    assembler = Assembler(data, patch=model.geometry.patch, fields=caption_fields(model.fields))
    text = text_field(model).name
    batches = [assembler.batch(np.array([number]), slots=range(1)) for number in range(len(data.items))]
    vectors = torch.cat([embed(scores.scorer, batch, text, runtime.device) for batch in batches], 1)
    captions, samples, rgb, aux, *_ = vectors
    right, found = (samples * captions).sum(-1), {}
    for kind, words in WORDS.items():
        changed = [other_word(item.caption, words) for item in data.items]
        texts = encode_prompts(config, changed, model, runtime).by_prompt
        wrong = torch.cat([scores.scorer.embed_caption(texts[one][text][None]) for one in changed])
        found[f"a caption of another {kind}"] = measured(right, (samples * wrong).sum(-1))
    frames = Frames(model, runtime.device)
    by_caption = {scene.attributes.caption: scene for scene in drawn(len(data.items), held_out=True)}
    asked = [by_caption[item.caption] for item in data.items]
    for kind, spoil in ERRORS.items():
        videos = [[frames.encode(video)[None] for video in in_order(spoil(scene), data.streams)] for scene in asked]
        wrong = torch.cat([scores.scorer.embed_sample(one)[0] for one in videos])
        found[f"a clip {kind}"] = measured(right, (wrong * captions).sum(-1))
    found["another clip's companion"] = measured((rgb * aux).sum(-1), (rgb * aux.roll(1, 0)).sum(-1))
    return found


def in_order(streams: Streams, names: Sequence[str]) -> list[np.ndarray]:
    return [streams[name] for name in names]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="demo_scorer.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", help="a folder for the demo, the clips and the scorer")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, such as scorer.steps=500")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is no folder; give one to write to")
    log_to_terminal(0)
    quiet_libraries()
    config = prepared(out, args.overrides)
    with running(device="cpu") as runtime:
        file = train_scorer(config, runtime, resume=(out / FOLDER / STATE_FILE).exists())
        found = errors_seen(config, file, runtime)
    for kind, values in found.items():
        print(f"{kind}: scores lower for {values['found']:.0%} of the clips, by {values['lower_by']:.3f} on average")
    print(json.dumps(json.loads((out / FOLDER / EVAL_FILE).read_text()) | {"errors": found}))


if __name__ == "__main__":
    raise SystemExit(run("demo_scorer", main))
