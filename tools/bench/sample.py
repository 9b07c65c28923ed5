"""Time a denoising step against the model's forward alone, and guidance in one batch of two against two forwards.

In each measure a whole video is denoised by `flow.solver.denoise` with UniPC, asking the engine as the sampler does;
the bar is the same number of the model's own forwards on the same inputs. All ratios are ours over theirs, so smaller
is better: `x_forward` without guidance, `x_forward_guided` with it (against twice as many forwards), and `x_one_batch`,
what one batch of both halves takes of two forwards one after the other; `…_short` is that on a sequence of an eighth,
where it matters more. Both ways must agree on the latents before anything is timed.

`x_half`: denoising beside a companion at scale 2, without guidance, against denoising beside one of full size.
`x_rgb_known`: a step of matting after the first, in which a given RGB that does not see its companion is known from it,
against such a step without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import harness
import torch
from rounds import Rounds
from torch import Tensor

from transpixeler.config.sections import LoraConfig, ParallelConfig
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.model import WanModel
from transpixeler.flow.objective import Fields
from transpixeler.flow.solver import denoise, start_noise
from transpixeler.models.costs import Costs
from transpixeler.models.lora import inject
from transpixeler.models.noising import RECTIFIED
from transpixeler.models.rgb_memory import RgbMemory
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import runtime
from transpixeler.parallel.pipeline import Engine, Stage
from transpixeler.sampling import sampler

GUIDANCE = 5.0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, repeats=12)
    harness.wan_arguments(parser)
    parser.add_argument("--text", type=int, default=512, help="width of a text's embedding")
    parser.add_argument("--steps", type=int, default=2)
    return parser.parse_args(argv)


def make_engine(args: argparse.Namespace, here: runtime.Runtime) -> Engine:
    """Return an engine of one stage with an adapter on its companion, in place, as `sample` runs it."""
    torch.manual_seed(0)
    model = WanModel(WanConfig.read(harness.wan_config(args, text_dim=args.text)), streams=("rgb", "seg"))
    inject(model, LoraConfig(rank=args.rank))
    mesh = meshes.build(meshes.resolve(ParallelConfig(), here.world_size), here)
    return Engine([Stage(model.eval())], ParallelConfig(), mesh, torch.float32, Costs.of(model))


class Matting:
    """Steps of an adapter under which RGB does not see its companion; RGB is known from a step before, or is not."""

    def __init__(self, engine: Engine, layout: StreamLayout, text: Tensor) -> None:
        (self.model,), self.layout = engine.models(), layout
        self.inputs = start_noise(layout, seed=0), torch.tensor([[0.0, 0.5]]), text[None]
        self.memory = RgbMemory()

    @torch.no_grad()
    def step(self, memory: RgbMemory | None = None) -> Tensor:
        self.model.rgb_attends_aux, self.model.rgb_forward_only, self.model.rgb_memory = False, True, memory
        try:
            return self.model(*self.inputs, layout=self.layout)[:, self.layout.sizes[0] :]
        finally:
            self.model.rgb_attends_aux, self.model.rgb_forward_only, self.model.rgb_memory = True, False, None

    def known(self) -> Tensor:
        self.memory.rewind()
        return self.step(self.memory)


class Denoising:
    """One video's denoising in every way that is measured."""

    def __init__(self, engine: Engine, grid: Sequence[int], args: argparse.Namespace, *, scale: int = 1) -> None:
        """scale: of the companion."""
        f, h, w = grid
        self.engine, self.steps, (self.model,) = engine, args.steps, engine.models()
        shapes = (16, f, 2 * h, 2 * w), (16, f, 2 * h // scale, 2 * w // scale)
        self.layout = StreamLayout(("rgb", "seg"), shapes, (1, 2, 2), scales=(1, scale))
        self.noise = start_noise(self.layout, seed=0)
        self.text, self.negative = ({"text": text} for text in torch.randn(2, 512, args.text))

    def plain(self) -> Tensor:
        return self._denoise(None, together=True)

    def guided(self) -> Tensor:
        return self._denoise(self.negative, together=True)

    def guided_apart(self) -> Tensor:
        return self._denoise(self.negative, together=False)

    def _denoise(self, negative: Fields | None, *, together: bool) -> Tensor:
        limit, sampler.GUIDANCE_BATCH_TOKENS = sampler.GUIDANCE_BATCH_TOKENS, self.layout.tokens if together else 0
        try:
            velocity = sampler.guided(self.engine, self.layout, self.text, negative, guidance=lambda _: GUIDANCE)
        finally:
            sampler.GUIDANCE_BATCH_TOKENS = limit
        solver = RECTIFIED.solver("unipc", steps=self.steps, shift=5.0)
        return denoise(velocity, self.noise, self.layout, solver)

    @torch.no_grad()
    def forwards(self, times: int = 1) -> None:
        """Run the model alone, as often as denoising without guidance does, times `times`."""
        steps = torch.ones(1, 2)
        for _ in range(self.steps * times):
            self.model(self.noise, steps, self.text["text"][None], layout=self.layout)


def measure(denoising: Denoising, half: Denoising, *, repeats: int) -> Rounds:
    """half: the same with a companion at scale 2."""
    torch.testing.assert_close(denoising.guided(), denoising.guided_apart(), atol=1e-4, rtol=1e-4)
    matting = Matting(denoising.engine, denoising.layout, denoising.text["text"])
    matting.known()  # the first step
    torch.testing.assert_close(matting.known(), matting.step(), atol=0, rtol=0)
    actions: dict[str, Callable[[], object]] = {
        "forwards": denoising.forwards,
        "plain": denoising.plain,
        "two forwards each": lambda: denoising.forwards(2),
        "half": half.plain,
        "guided": denoising.guided,
        "guided, one by one": denoising.guided_apart,
        "matting": matting.step,
        "matting, RGB known": matting.known,
    }
    print(f"{denoising.layout.tokens} tokens")
    return harness.alternate(actions, repeats=repeats, clock=harness.step_clock())


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1)
    f, h, w = args.grid
    with runtime.running(device="cpu") as here:
        engine = make_engine(args, here)
        long, short = (
            measure(Denoising(engine, grid, args), Denoising(engine, grid, args, scale=2), repeats=args.repeats)
            for grid in ((f, h, w), (f // 2, h // 2, w // 2))
        )
    figures = {
        "step_seconds": round(long["guided"].median / args.steps, 4),
        "x_forward": long.ratio("plain", "forwards").figure,
        "x_forward_guided": long.ratio("guided", "two forwards each").figure,
        "x_one_batch": long.ratio("guided", "guided, one by one").figure,
        "x_forward_short": short.ratio("plain", "forwards").figure,
        "x_one_batch_short": short.ratio("guided", "guided, one by one").figure,
        "x_half": long.ratio("half", "plain").figure,
        "x_rgb_known": long.ratio("matting, RGB known", "matting").figure,
        "spread": round(max(t.spread for times in (long, short) for t in times.values()), 3),
        "tokens": 2 * f * h * w,
    }
    harness.finish("sample", figures, record=not args.no_record, argv=argv)


if __name__ == "__main__":
    main()
