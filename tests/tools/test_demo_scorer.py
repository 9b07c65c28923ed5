"""The errors that the demo's scorer is tried with are errors: one thing that is said or shown, and no other."""

from __future__ import annotations

from dataclasses import replace

import demo_scorer
import numpy as np
from demo_figures import true_streams
from demo_measures import color, direction, silhouette

from transpixeler.demo.scenes import OPACITIES, all_attributes

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def test_one_word_of_a_kind_is_another() -> None:
    for attributes in all_attributes():
        caption = attributes.caption
        for kind, words in demo_scorer.WORDS.items():
            changed = demo_scorer.other_word(caption, words)
            own = getattr(attributes, kind)
            assert any(changed == caption.replace(own, word) for word in words if word != own)


def test_a_clip_with_an_error_shows_that_error_alone() -> None:
    for scene in demo_scorer.drawn(6, held_out=True):
        true, name = true_streams(scene), scene.attributes.direction
        wrong = {kind: spoil(scene) for kind, spoil in demo_scorer.ERRORS.items()}
        recolored = wrong.pop("recoloured")
        assert color(recolored["rgb"]) != color(true["rgb"]) and direction(recolored["rgb"]) == name
        assert np.array_equal(recolored["seg"], true["seg"])
        for streams in wrong.values():
            assert direction(streams["rgb"]) == OPPOSITE[name] and color(streams["rgb"]) == color(true["rgb"])
            assert silhouette(streams["rgb"]).sum() == silhouette(true["rgb"]).sum()


def test_rgb_does_not_show_what_its_companion_does() -> None:
    """So a caption is compared with both: RGB alone could tell half of the held-out captions from their twins."""
    said = {one.caption: one for one in demo_scorer.HELD_OUT}
    twins = [demo_scorer.other_word(caption, tuple(OPACITIES)) for caption in said]
    assert len(said) == demo_scorer.CLIPS["eval"] and all(twin in said for twin in twins)
    scene = demo_scorer.drawn(1, held_out=True)[0]
    attributes = said[demo_scorer.other_word(scene.attributes.caption, tuple(OPACITIES))]
    one, other = (true_streams(replace(scene, attributes=which)) for which in (scene.attributes, attributes))
    assert np.array_equal(one["rgb"], other["rgb"]) and not np.array_equal(one["seg"], other["seg"])
