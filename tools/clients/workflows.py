"""Run the example workflows of our nodes on the server of a real ComfyUI, and compare what they make with our sampler.

In: the folder of a ComfyUI, of which nothing is changed: models of random weights, our nodes and all files lie in a
folder of their own. Out: a line of JSON for each workflow. The models are tiny and the texts are not encoded; all else,
from loading the nodes to saving the files, is the workflow as it is shipped, asked for over HTTP. The exit code is 1
where a result is not ours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from clients.cases import ADAPTERS, CASES, CHAIN, PLAIN_BASE, SIDE, Case, Prompt
from clients.comfyui import NODES, imported
from clients.expected import Made, expected
from clients.tiny import WAN, chained, original_weights, shrink_vaes, trained, write_base
from tooling import run

from transpixeler.config.sections import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from transpixeler.models.backbone import Backbone

EXAMPLES = NODES / "example_workflows"
TOLERANCE = 1e-4  # of the largest value; fp32 gives some 1e-6
LENGTH, CLIP_FRAMES = 9, 12
PATIENCE = 240  # seconds
HELPER = '''"""A text of random numbers that depend on its letters alone, an image's, and small VAEs."""
import sys
import types
sys.path.insert(0, {root!r})
from clients.expected import text_of, vision
from clients.tiny import shrink_vaes

shrink_vaes()

class TinyText:
    CATEGORY, FUNCTION, RETURN_TYPES = "tiny", "encode", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"text": ("STRING", {{}})}}}}

    def encode(self, text):
        return ([[text_of(text), {{}}]],)

class TinyVision:
    CATEGORY, FUNCTION, RETURN_TYPES = "tiny", "encode", ("CLIP_VISION_OUTPUT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"image": ("IMAGE",)}}}}

    def encode(self, image):
        return (types.SimpleNamespace(penultimate_hidden_states=vision()),)

NODE_CLASS_MAPPINGS = {{"TinyText": TinyText, "TinyVision": TinyVision}}
'''


def workflows(argv: Sequence[str]) -> None:
    """Print a line for every workflow; raise SystemExit(1) where one does not give what our sampler does."""
    options = _parser().parse_args(argv)
    imported(options.comfyui)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        models, shown = _world(Path(folder))
        with _server(options.comfyui.resolve(), Path(folder)) as server:
            for case in CASES:
                if not options.only or case.name in options.only or case.told in options.only:
                    line = _line(server, Path(folder), case, models, shown)
                    print(json.dumps(line), flush=True)
                    good &= line["as_said"]
    if not good:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="workflows", description=__doc__)
    parser.add_argument("--comfyui", required=True, type=Path, metavar="FOLDER", help="the folder of a ComfyUI")
    parser.add_argument("--only", action="append", metavar="NAME", help="one workflow; may be given again")
    return parser


# -- what the workflows read


def _world(folder: Path) -> tuple[dict[str, Backbone], dict[int, Tensor]]:
    """Fill ComfyUI's base folder; return our models by the name of the adapter's file, and what is shown."""
    from safetensors.torch import save_file

    from transpixeler.adapters.files import write_adapter

    for name in ("diffusion_models", "loras", "vae", "text_encoders"):
        (folder / "models" / name).mkdir(parents=True)
    shutil.copytree(NODES, folder / "custom_nodes/transpixeler")
    root = str(Path(__file__).parents[1])
    (folder / "custom_nodes/tiny_text.py").write_text(HELPER.format(root=root))
    (folder / "web").mkdir()
    (folder / "web/index.html").touch()
    found = {}
    for number, one in enumerate(ADAPTERS):
        base = folder / "bases" / one.base.partition(".safetensors")[0]
        if not base.is_dir():
            write_base(one.tiny, base, seed=number)
        model, adapter = trained(one.tiny, base, ("rgb", "seg"), attends=one.attends, **one.said)
        save_file(original_weights(base, adapter.family), folder / "models/diffusion_models" / one.base)
        write_adapter(adapter, folder / "models/loras" / one.file)
        found[one.file] = model
    parts = [(found[name], strength) for name, strength in CHAIN.items()]
    plain = folder / "bases" / PLAIN_BASE.partition(".safetensors")[0]
    found[", ".join(sorted(CHAIN))] = chained(WAN, plain, parts)
    vae = folder / "models/vae/wan_2.1_vae.safetensors"
    _write_vaes(vae, folder / "models/vae/wan2.2_vae.safetensors")
    _write_given(folder / "input")
    return found, _shown_latents(vae, folder / "input/first_frame.png")


def _write_vaes(first: Path, second: Path) -> None:
    """Write small VAEs of random weights: of Wan 2.1, and of Wan 2.2 5B."""
    import comfy.ldm.wan.vae as wan  # pyright: ignore[reportMissingImports]  in the folder that the user gives
    import comfy.ldm.wan.vae2_2 as wan22  # pyright: ignore[reportMissingImports]
    import torch
    from safetensors.torch import save_file

    shrink_vaes()
    torch.manual_seed(0)
    for file, module, channels in ((first, wan, 16), (second, wan22, 48)):
        model = module.WanVAE(z_dim=channels, temperal_downsample=[False, True, True])
        state = model.state_dict()  # ComfyUI leaves it as the memory was
        made = {name: torch.randn(value.shape) / max(1, value[0].numel()) ** 0.5 for name, value in state.items()}
        save_file({name: torch.ones_like(value) if "gamma" in name else value for name, value in made.items()}, file)


def _shown_latents(vae: Path, picture: Path) -> dict[int, Tensor]:
    """Return by stream the latents of a first frame and grey ones, or of grey ones alone; -1: of those too."""
    import comfy.sd  # pyright: ignore[reportMissingImports]  in the folder that the user gives
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    grey = torch.full((LENGTH, SIDE, SIDE, 3), 0.5)
    video = grey.clone()
    video[0] = torch.from_numpy(np.asarray(Image.open(picture), np.float32) / 255)
    encoder = comfy.sd.VAE(sd=load_file(vae), dtype=torch.float32)
    shown, blank = encoder.encode(video), encoder.encode(grey)
    return {0: shown, 1: blank, -1: blank}


def _write_given(folder: Path) -> None:
    """Write the video and the picture that workflows are given."""
    from fractions import Fraction

    import numpy as np
    from PIL import Image

    from transpixeler.data.media.write import write_browser_mp4

    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (CLIP_FRAMES, SIDE, SIDE, 3), np.uint8)
    write_browser_mp4(folder / "clip.mp4", frames, fps=Fraction(16), exact=True, facts={})
    Image.fromarray(frames[0]).save(folder / "first_frame.png")


# -- the server


class Server:
    """The HTTP interface of a ComfyUI that runs."""

    def __init__(self, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.address, self.process, self.log = address, process, log

    def ask(self, path: str, data: Mapping[str, Any] | None = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as fault:
            raise UserError(f"ComfyUI refuses {path}: {fault.read().decode()}") from None

    def wait(self, path: str, done: Any) -> Any:
        """Ask until `done` of the answer is true, for as long as the process lives and patience lasts."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if done(answer := self.ask(path)):
                    return answer
            except OSError:
                pass  # it does not listen yet, or is not ready to answer
            time.sleep(0.5)
        raise UserError(f"ComfyUI did not answer {path}; it said: {self.log.read_text()[-3000:]}")


@contextmanager
def _server(comfyui: Path, folder: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--cpu --force-fp32 --fp32-unet --fp32-vae --disable-auto-launch --disable-api-nodes --port {port}"
    places = ["--base-directory", folder, "--front-end-root", folder / "web", "--database-url", "sqlite:///:memory:"]
    log = folder / "log.txt"
    with log.open("wb") as out:
        command = [sys.executable, "main.py", *options.split(), *map(str, places)]
        process = subprocess.Popen(command, cwd=comfyui, stdout=out, stderr=subprocess.STDOUT)
        try:
            server = Server(f"http://127.0.0.1:{port}", process, log)
            server.wait("/system_stats", lambda answer: True)
            yield server
        finally:
            process.terminate()
            process.wait(30)


# -- one workflow


def _line(
    server: Server, folder: Path, case: Case, models: Mapping[str, Backbone], shown: Mapping[int, Tensor]
) -> dict[str, Any]:
    from safetensors.torch import load_file

    prompt: Prompt = json.loads((EXAMPLES / f"api/{case.name}.json").read_text())
    page = json.loads((EXAMPLES / f"{case.name}.json").read_text())
    same = to_api(page, server.ask("/object_info")) == _plain(prompt)
    case.change(prompt)
    samplers = _shrink(prompt, case)
    answer = server.ask("/prompt", {"prompt": prompt})
    done = server.wait(f"/history/{answer['prompt_id']}", bool)[answer["prompt_id"]]
    told: dict[str, Any] = {"workflow": case.told, "drawn_alike": same}
    if done["status"]["status_str"] != "success":
        fault = next(message for kind, message in done["status"]["messages"] if kind == "execution_error")
        return told | {"fault": fault["exception_message"], "as_said": False}
    files = {node: out["latents"][0]["filename"] for node, out in done["outputs"].items() if "latents" in out}
    start, found = (load_file(folder / "output/latents" / files[node])["latent_tensor"] for node in ("start", "end"))
    made: Made = expected(prompt, samplers, start, found, models, shown, (1, case.scale))
    files_made = sum(len(out.get("images", ())) for out in done["outputs"].values())
    good = same and made.error < TOLERANCE and files_made == LENGTH + 1
    return told | {"error": made.error, "given": made.given, "files": files_made, "as_said": good}


def _shrink(prompt: Prompt, case: Case) -> list[str]:
    """Make a workflow small and its texts plain, and have it save its latents; return its samplers in their order."""
    samplers = []
    for key, node in prompt.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CLIPTextEncode":
            node.update(class_type="TinyText", inputs={"text": inputs["text"]})
        if "steps" in inputs:
            inputs["steps"] = case.steps
        if "sampler_name" in inputs:
            inputs["sampler_name"] = "euler"
            samplers.append(key)
        if kind == "TranspixelerJointLatent":
            inputs |= {"width": case.side, "height": case.side, "length": LENGTH}
        if kind == "TranspixelerJointAdapter" and case.scale > 1:
            inputs["adapter"] = f"joint_scale_{case.scale}.safetensors"
    del prompt["2"]
    start = next(key for key, node in prompt.items() if node["class_type"] == "TranspixelerJointLatent")
    samplers.sort(key=int)
    for name, source in (("start", start), ("end", samplers[-1])):
        save = {"samples": [source, 0], "filename_prefix": f"latents/{name}"}
        prompt[name] = {"class_type": "SaveLatent", "inputs": save}
    return samplers


# -- the two forms of a workflow


def to_api(drawn: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ComfyUI's page asks for, for a workflow that is drawn there. known: the server's /object_info."""
    links = {link[0]: [str(link[1]), link[2]] for link in drawn["links"]}
    made = {}
    for node in drawn["nodes"]:
        inputs = {one["name"]: links[one["link"]] for one in node["inputs"] if one.get("link") is not None}
        values = iter(node["widgets_values"])
        for name, (kind, *more) in _inputs(known[node["type"]]).items():
            options = more[0] if more else {}
            if not is_widget(kind):
                continue
            value = next(values)
            if options.get("control_after_generate"):
                next(values)
            inputs.setdefault(name, value)
        made[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return made


def is_widget(kind: Any) -> bool:
    """Tell whether an input is set on the node itself: a choice, a number or a text."""
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def _inputs(node: Mapping[str, Any]) -> dict[str, Any]:
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def _plain(prompt: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}


if __name__ == "__main__":
    sys.exit(run("workflows", workflows))
