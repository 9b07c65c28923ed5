"""Say on a model card how to use it: with this project, in diffusers and in ComfyUI, by programs that save a video."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata

from transpixeler.adapters.saved import ADAPTER_FILE
from transpixeler.publishing import markdown
from transpixeler.publishing.card_facts import Card

NODE_FOLDER = "comfyui"  # in the repository


def use_section(card: Card) -> list[str]:
    """Say how to load it: here, in diffusers and in ComfyUI."""
    lines = ["## Use", *_fused_note(card), "### transpixeler", *_ours(card)]
    if not card.elsewhere:
        return [*lines, f"diffusers and ComfyUI do not know {card.model.family.title}: use the command above."]
    full = card.model.weights is not None
    return [*lines, "### diffusers", *_diffusers(card), *([] if full else ["### ComfyUI", _comfyui(card)])]


def _base(card: Card) -> str:
    return card.base or "PATH_OF_THE_BASE"


def _ours(card: Card) -> list[str]:
    """Return the lines that install the project and make a video with it."""
    size, prompt, joint = card.size, card.prompt, len(card.streams) > 1
    sized, seen = (f"--size {'x'.join(map(str, size))} ", f", size={size}") if size else ("", "")
    format, formats = (" --format mov", ', formats=("mov",)') if joint else ("", "")
    shown = "".join(f"--{name.removesuffix('_image')} {file} " for name, file in card.pictures.items())
    given = "".join(f', {name.removesuffix("_image")}="{file}"' for name, file in card.pictures.items())
    shell = (
        f"transpixeler sample {card.repo} --model {_base(card)} \\\n"
        f'    {sized}{shown}--prompt "{prompt}"{format} --out samples'
    )
    python = (
        "import transpixeler as tp\n\n"
        f'model = tp.load("{card.repo}", "model.path={_base(card)}")\n'
        f'(made,) = model.sample("{prompt}"{seen}{given}{formats}, out="samples")\n'
        "print(made.folder, made.rgba.shape)  # its files, and the frames as an array"
    )
    return [f"```sh\n{install_line()}\n{shell}\n```", *_given(card), "From Python:", f"```python\n{python}\n```"]


def _given(card: Card) -> list[str]:
    """Name the options for what it was trained to be given."""
    rgb, tasks = card.streams[0], card.config.objective.tasks
    known = {
        f"{rgb}_to_aux": ("rgb clip.mp4", "the other streams of a given video"),
        f"aux_to_{rgb}": ("alpha matte.mp4", "the video of a given companion"),
        **({} if card.pictures else {"image_to_video": ("image first.png", "a video that begins with a given image")}),
    }
    told = [f"`--{option}` makes {what}" for task, (option, what) in known.items() if tasks.get(task, 0) > 0]
    return [f"It was trained for this, too: {'; '.join(told)}."] if told else []


def install_line() -> str:
    """Return the command that installs this project, from the repository that its package names if it names one."""
    try:
        urls = metadata("transpixeler").get_all("Project-URL") or ()
    except PackageNotFoundError:  # run from its folder
        urls = ()
    named = [url.partition(", ") for url in urls]
    source = next((url for name, _, url in named if name.lower() in ("repository", "source")), "")
    return f'pip install "git+{source}"' if source else "pip install .   # in transpixeler's own folder"


def _diffusers(card: Card) -> list[str]:
    if not card.plain:
        return [
            "diffusers generates one stream and cannot make the companions. Use the command above: it writes every "
            "stream as a video, and RGBA files with the alpha inside."
        ]
    full, model = card.model.weights is not None, card.model
    whole = f'{model.family.transformer_class}.from_pretrained("{card.repo}", subfolder="transformer")'
    lora = "\n".join(_load_line(card, name) for name in model.adapters)
    lines = ["```sh\npip install -U diffusers transformers accelerate peft\n```"]
    lines.append(_program(card, whole if full else lora, full=full))
    if model.adapter is not None and model.adapter.is_dora:
        lines.append(_exported(card, "diffusers") + " The line above then reads that file.")
    return lines


def _joint_in_comfyui(card: Card) -> str:
    """Tell how ComfyUI takes an adapter of several streams, or why it does not."""
    adapter, put = card.model.adapter, f"Put `{ADAPTER_FILE}` into `models/loras`"
    node = "the streams need the custom nodes of transpixeler's `tools/comfyui`"
    if adapter is not None and adapter.is_dora:
        return "No custom node reads a DoRA of several streams. Use the command above."
    if adapter is not None and adapter.own_streams:
        only = f"transpixeler export {card.repo} --format comfyui --only {card.streams[-1]} --out {card.streams[-1]}/"
        return (
            "Each stream has matrices of its own, which the custom nodes do not know. Write one companion by itself, "
            f"as with `{only}`. {put}; {node}."
        )
    if card.node is None:
        return f"{put}; {node}."
    folder = f"{NODE_FOLDER}/{card.node.name}"
    nodes = f"[{folder}]({folder}/README.md)"
    return (
        f"{put} and the folder {nodes} into `custom_nodes`: its nodes make the streams, and it has example workflows."
    )


def _comfyui(card: Card) -> str:
    if not card.plain:
        return _joint_in_comfyui(card)
    if card.model.adapter is not None and card.model.adapter.is_dora:
        return _exported(card, "comfyui") + " Put that file into `models/loras`."
    if len(card.experts) > 1:
        files = " and ".join(f"`{name}/{ADAPTER_FILE}`" for name in card.experts)
        return (
            f"Put {files} into `models/loras`, under names of their own, and load each with `LoraLoaderModelOnly` on "
            "the expert of the base that it is for."
        )
    return f"Put `{ADAPTER_FILE}` into `models/loras` and load it with `LoraLoaderModelOnly` on the base model."


def _load_line(card: Card, expert: str) -> str:
    """Return the line of diffusers that loads an adapter; of two experts, the second is its `transformer_2`."""
    if not expert:
        return f'pipe.load_lora_weights("{card.repo}", weight_name="{ADAPTER_FILE}")'
    place = f'subfolder="{expert}", ' if len(card.experts) > 1 else ""
    second = ", load_into_transformer_2=True" if expert in card.model.family.experts[1:] else ""
    return (
        f'pipe.load_lora_weights("{card.repo}", {place}weight_name="{ADAPTER_FILE}", adapter_name="{expert}"{second})'
    )


def _exported(card: Card, format: str) -> str:
    """Tell how another program gets the file that it reads of a DoRA."""
    return f"This is a DoRA: write it first with `transpixeler export {card.repo} --format {format} --out dora/`."


def _fused_note(card: Card) -> list[str]:
    names = ", ".join(markdown.code(name) for name in card.fused)
    text = f"It was trained on the base with {names} added: other programs must load both."
    return [text] if names and card.model.weights is None else []


def _program(card: Card, line: str, *, full: bool) -> str:
    """Return a program of diffusers that makes and saves one video, or image."""
    family, image = card.model.family, card.model.family.makes == "image"
    load, given = (f"transformer = {line}\n", ", transformer=transformer") if full else ("", "")
    name = family.image_pipeline_class if card.pictures else family.pipeline_class
    names = ", ".join([name, *([family.transformer_class] if full else [])])
    width, height, frames = card.size or (0, 0, 0)
    sized = f", width={width}, height={height}" + ("" if image else f", num_frames={frames}") if card.size else ""
    pictures = "".join(f'{each}=load_image("{file}"), ' for each, file in card.pictures.items())
    make = f'pipe({pictures}prompt="{card.prompt}"{sized})' if pictures else f'pipe("{card.prompt}"{sized})'
    saved = (
        f'{make}.images[0].save("image.png")'
        if image
        else f'frames = {make}.frames[0]\nexport_to_video(frames, "video.mp4", fps={card.config.data.fps:g})'
    )
    tools = ", ".join([*([] if image else ["export_to_video"]), *(["load_image"] if pictures else [])])
    writer = f"from diffusers.utils import {tools}\n" if tools else ""
    how = f"{given}, torch_dtype=torch.bfloat16"
    return (
        f"```python\nimport torch\nfrom diffusers import {names}\n{writer}\n{load}"
        f'pipe = {name}.from_pretrained("{_base(card)}"{how}).to("cuda")\n'
        f"{'' if full else line + chr(10)}{saved}\n```"
    )
