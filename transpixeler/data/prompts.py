"""List the texts that a config samples from: a config in; its prompts and negative prompt, to be cached, out."""

from __future__ import annotations

from pathlib import Path

from transpixeler.config import Config, SampleConfig, UserError
from transpixeler.models.family import Family


def prompt_lines(path: str, *, key: str) -> list[str]:
    """Return the lines of a file that are not empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig") if path else ""
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"{key}: {path} cannot be read: {fault}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_prompts(config: SampleConfig) -> tuple[str, ...]:
    """Return `sample.prompts` and the lines of `sample.prompts_file`."""
    return (*config.prompts, *prompt_lines(config.prompts_file, key="sample.prompts_file"))


def negative_prompt(config: SampleConfig, family: Family) -> str | None:
    """Return the negative prompt, or None where guidance is off."""
    given = config.guidance.values() if isinstance(config.guidance, dict) else (config.guidance,)
    if all(guidance == 1 for guidance in given):
        return None
    return family.sampling.negative_prompt if config.negative_prompt is None else config.negative_prompt


def sampled_texts(config: Config, family: Family) -> tuple[str, ...]:
    """Return the texts that evaluations sample from besides the clips' own captions."""
    prompts, negative = read_prompts(config.sample), negative_prompt(config.sample, family)
    sampled = bool(prompts) or (config.eval.samples > 0 and bool(config.data.eval))
    return (*prompts, *([negative] if sampled and negative is not None else []))
