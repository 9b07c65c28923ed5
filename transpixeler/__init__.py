"""Train a video diffusion transformer to generate several aligned videos at once.

    import transpixeler as tp

    config = tp.read_config("my.yaml", "optim.lr=5e-5")   # a file, and keys to set
    data = tp.encode(config)                              # or a folder: tp.encode("clips", "model.path=base")
    run = tp.train(config, callbacks=tp.Callbacks(on_step=print))
    loaded = tp.load(run)                                 # a run, a save, an adapter file or a Hub id
    [video] = loaded.sample("a red circle", seed=7)       # video.rgb, video.alpha, video.rgba: arrays
    loaded.sample(["one", "two"], out="samples")          # files too

tp.Prompt holds a prompt with a seed, a negative prompt, a size and files of its own. What a user can mend is raised as
tp.UserError, other faults as tp.Fault. help(tp.load) and so on say more; `transpixeler --help` lists the commands.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transpixeler.api import Model as Model
    from transpixeler.api import Sample as Sample
    from transpixeler.api import encode as encode
    from transpixeler.api import load as load
    from transpixeler.api import read_config as read_config
    from transpixeler.api import train as train
    from transpixeler.config.sections import Fault as Fault
    from transpixeler.config.sections import UserError as UserError
    from transpixeler.data.prompts import Prompt as Prompt
    from transpixeler.training.callbacks import Callbacks as Callbacks

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here

__all__ = []  # what is offered is imported when it is asked for
_PLACES = {
    **dict.fromkeys(("read_config", "encode", "train", "load", "Model", "Sample"), "transpixeler.api"),
    **dict.fromkeys(("UserError", "Fault"), "transpixeler.config.sections"),
    "Prompt": "transpixeler.data.prompts",
    "Callbacks": "transpixeler.training.callbacks",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that importing the package loads nothing."""
    if name not in _PLACES:
        raise AttributeError(f"module 'transpixeler' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
