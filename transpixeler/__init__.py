"""Train a video diffusion transformer to generate several aligned videos at once.

    run = tp.train(tp.read_config("my.yaml", "optim.lr=5e-5"), callbacks=tp.Callbacks(on_step=print))
    [video] = tp.load(run).sample(tp.Prompt("a red circle", seed=7))  # video.rgb, video.alpha, video.rgba: arrays
tp.encode("clips", "model.path=base") fills a cache; tp.UserError and tp.Fault are raised; help(tp.load) says more.
"""

import sys as _sys
import typing as _typing
from types import ModuleType as _ModuleType

if _typing.TYPE_CHECKING:
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

_PLACES = {
    **dict.fromkeys(("read_config", "encode", "train", "load", "Model", "Sample"), "transpixeler.api"),
    **dict.fromkeys(("UserError", "Fault"), "transpixeler.config.sections"),
    "Prompt": "transpixeler.data.prompts",
    "Callbacks": "transpixeler.training.callbacks",
}


class _Offering(_ModuleType):
    """Import what is asked for, so that importing the package loads nothing. In a class `help` does not list this."""

    def __getattr__(self, name: str) -> _typing.Any:
        if name not in _PLACES:
            raise AttributeError(f"module 'transpixeler' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)

    def __dir__(self) -> list[str]:
        return sorted([*vars(self), *_PLACES])


_sys.modules[__name__].__class__ = _Offering
