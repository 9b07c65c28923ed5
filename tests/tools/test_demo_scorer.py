"""The errors that the demo's scorer is tried with are errors: one word of a caption, and no other."""

from __future__ import annotations

import demo_scorer

from transpixeler.demo.scenes import all_attributes


def test_one_word_of_a_kind_is_another() -> None:
    for attributes in all_attributes():
        caption = attributes.caption
        for kind, words in demo_scorer.WORDS.items():
            changed = demo_scorer.other_word(caption, words).replace(",", " ,").split()
            different = [(a, b) for a, b in zip(caption.replace(",", " ,").split(), changed, strict=True) if a != b]
            assert len(different) == 1 and getattr(attributes, kind) == different[0][0] and different[0][1] in words
