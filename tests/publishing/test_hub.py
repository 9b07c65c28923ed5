"""What is pushed arrives byte for byte, once, with a card that the Hub can read; the token stays where it was."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.publishing.test_report import write_run
from tests.support.hub_server import CLIENT, READER, TOKEN, Hub, serving, serving_here
from tests.support.models import TINY, tiny, wan_folder
from tests.support.saves import BASE, TERMS, contents, save_adapter
from transpixeler import cli
from transpixeler.adapters import files as adapter_files
from transpixeler.adapters import merge
from transpixeler.config import loading
from transpixeler.config.sections import (
    Config,
    DataConfig,
    Fault,
    HubConfig,
    LoraConfig,
    ModelConfig,
    SampleConfig,
    SourceConfig,
    UserError,
)
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import runtime
from transpixeler.publishing import hub
from transpixeler.sampling import saves
from transpixeler.sampling.model import open_engine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("hub") / "flames")
    save_adapter(folder / "step30")
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving_here(monkeypatch, tmp_path) as made:
        yield made


def test_every_file_arrives_byte_for_byte(run: Path, server: Hub) -> None:
    parcel = hub.pack(str(run), TERMS)
    assert hub.push(parcel) == f"{server.endpoint}/me/flames"
    wanted = contents(parcel)
    assert server.repos["me/flames"] == wanted and server.private["me/flames"]
    assert {"README.md", "config.yaml", "adapter_model.safetensors", "adapter_config.json"} < set(wanted)
    saved = (run / "step30" / "adapter_model.safetensors").read_bytes()
    tensors = saved[8 + int.from_bytes(saved[:8], "little") :]
    assert wanted["adapter_model.safetensors"].endswith(tensors)
    assert any(re.fullmatch(r"samples/000/still\.png", path) for path in wanted)


def test_only_what_has_changed_is_sent_again(run: Path, server: Hub, tmp_path: Path) -> None:
    hub.push(hub.pack(str(run), TERMS))
    hub.push(hub.pack(str(run), TERMS))
    assert len(server.commits) == 1, "nothing had changed"
    other = save_adapter(tmp_path / "step30", seed=2)
    hub.push(hub.pack(str(other), TERMS))
    assert "adapter_model.safetensors" in server.commits[1]
    if CLIENT >= (1, 17):  # older clients send small files again, to the same content
        assert "config.yaml" not in server.commits[1]


def test_a_push_that_breaks_half_way_goes_on_where_it_broke(
    run: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    server.uploads_left = 2
    with pytest.raises(Fault, match=r"did not arrive.*run push again") as broken:
        hub.push(hub.pack(str(run), TERMS))
    assert "\n" not in str(broken.value) and not server.commits and len(server.uploads) == 2
    arrived, server.uploads_left = list(server.uploads), 10**6
    hub.push(hub.pack(str(run), TERMS))
    later = server.uploads[len(arrived) :]
    assert later and not set(later) & set(arrived), "what had arrived was sent again"
    assert "README.md" in server.repos["me/flames"] and len(server.commits) == 1


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_the_card_says_what_the_hub_asks_for(run: Path) -> None:
    parcel = hub.pack(str(run), TERMS)
    card = parcel.files["README.md"].decode()
    assert header(card) == {
        "license": "apache-2.0",
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "transpixeler",
        "pipeline_tag": "text-to-video",
        "tags": ["text-to-video", "wan", "transpixeler", "lora", "joint-generation", "seg"],
        "widget": [
            {"text": f"a star, {name}", "output": {"url": f"samples/{name}/checkerboard.mp4"}}
            for name in ("000", "001")
        ],
    }
    assert "\n<Gallery />\n" in card and all(one["output"]["url"] in parcel.files for one in header(card)["widget"])
    linked = [path for path in re.findall(r"\]\(([^)]+)\)", card) if not path.startswith("http")]
    assert linked and set(linked) <= set(parcel.files)
    assert "| steps | 30 |" in card and "| held-out loss of rgb |" in card
    assert f"transpixeler sample me/flames --model {BASE}" in card


def test_the_figures_are_those_of_the_saved_step(run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    losses = [line["loss"] for line in lines if "loss" in line]
    card = hub.pack(str(run), TERMS).files["README.md"].decode()
    assert f"| loss, mean of the last 30 steps | {sum(losses) / 30:.4f} |" in card


def test_a_copy_that_a_user_keeps_beside_the_samples_is_left_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "flames")
    save_adapter(run / "step30")
    shutil.copytree(run / "samples/step00000030", run / "samples/step00000040-best")
    shown = hub.pack(str(run), TERMS).files["samples/000/still.png"]
    assert shown == run / "samples/step00000030/000/still.png"


def test_a_plain_adapters_card_loads_it_in_diffusers(tmp_path: Path) -> None:
    card = hub.pack(str(save_adapter(tmp_path / "step30", streams=1)), TERMS).files["README.md"].decode()
    assert header(card)["library_name"] == "diffusers"
    _, program = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(program, "card", "exec")
    assert 'load_lora_weights("me/flames", weight_name="adapter_model.safetensors")' in program
    assert "LoraLoaderModelOnly" in card


FUSED = ("/secret/style.safetensors", "/secret/hub/models--me--speed/snapshots/0a1b", "you/look")


@pytest.mark.parametrize("base", [BASE, ""])
@pytest.mark.parametrize("alone", [False, True])
def test_no_folder_of_this_machine_is_told(alone: bool, base: str, run: Path, tmp_path: Path) -> None:
    save = save_adapter(tmp_path / "step30", fused=FUSED)
    source = save / "adapter_model.safetensors" if alone else save
    files = contents(hub.pack(str(source), dataclasses.replace(TERMS, base=base)))
    everything = [*files.items(), *contents(hub.pack(str(run), TERMS)).items()]
    assert not [path for path, content in everything if b"/secret" in content or bytes(run.parent) in content]
    assert yaml.safe_load(files["config.yaml"])["model"]["path"] == (base or "wan")
    (tmp_path / "arrived").mkdir()
    for name in {"adapter_model.safetensors", "adapter_config.json"} & set(files):
        (tmp_path / "arrived" / name).write_bytes(files[name])
    before, after = adapter_files.read_adapter(source), adapter_files.read_adapter(tmp_path / "arrived")
    changed = {"base_model": base or "wan", "fuse": '["style.safetensors", "me/speed", "you/look"]'}
    assert after.metadata == {**before.metadata, **changed}
    assert dataclasses.replace(after, metadata=before.metadata).matches(before)
    assert alone or json.loads(files["adapter_config.json"])["base_model_name_or_path"] == (base or "wan")


def test_a_prompt_that_begins_as_a_path_does_goes_as_it_is(tmp_path: Path) -> None:
    file = save_adapter(tmp_path / "step30") / "config.yaml"
    prompts = ("~soft light~ a red ball", "/imagine a red ball and/or a cat")
    data = DataConfig(train=(SourceConfig("/secret/clips", name="/clips"),), cache_dir="/secret/cache")
    sample = SampleConfig(prompts=prompts, prompts_file="/secret/prompts.txt", negative_prompt="/none")
    file.write_text(loading.dump(dataclasses.replace(loading.load(file), data=data, sample=sample)))
    found = yaml.safe_load(hub.pack(str(file.parent), TERMS).files["config.yaml"])
    assert tuple(found["sample"]["prompts"]) == prompts and found["sample"]["negative_prompt"] == "/none"
    assert (found["sample"]["prompts_file"], found["data"]["cache_dir"]) == ("prompts.txt", "cache")
    assert (found["data"]["train"][0]["path"], found["data"]["train"][0]["name"]) == ("clips", "/clips")


def test_the_card_says_what_is_in_the_base(tmp_path: Path) -> None:
    card = hub.pack(str(save_adapter(tmp_path / "step30", fused=FUSED)), TERMS).files["README.md"].decode()
    assert "the base with `style.safetensors`, `me/speed`, `you/look` added" in card
    assert "added: other" not in hub.pack(str(save_adapter(tmp_path / "step40")), TERMS).files["README.md"].decode()


@pytest.mark.parametrize("pictures", [("image",), ("image", "last_image")])
def test_the_card_of_a_base_that_is_shown_pictures_shows_it_some(tmp_path: Path, pictures: tuple[str, ...]) -> None:
    save = save_adapter(tmp_path / "step30", streams=1)
    card = hub.pack(str(save), TERMS).files["README.md"].decode()
    assert "pipe = WanPipeline.from_pretrained(" in card and 'pipe("…").frames' in card and "load_image" not in card
    adapter = adapter_files.read_adapter(save)
    told = {**adapter.metadata, "pictures": ",".join([*pictures, "x=exit()"])}
    adapter_files.write_adapter(dataclasses.replace(adapter, metadata=told), save)
    card = hub.pack(str(save), TERMS).files["README.md"].decode()
    assert "from diffusers import WanImageToVideoPipeline\n" in card and "exit" not in card
    last = ', last_image=load_image("last.png")' * ("last_image" in pictures)
    assert f'pipe(image=load_image("first.png"){last}, prompt="…").frames[0]' in card
    assert "pipeline_tag: image-to-video" in card
    assert f"--image first.png{' --last last.png' * ('last_image' in pictures)} --prompt" in card


def test_a_whole_models_card_says_nothing_of_programs_that_do_not_read_it(tmp_path: Path) -> None:
    for streams in (1, 2):
        save = save_model(tmp_path / str(streams) / "step30", base=tmp_path / "wan", streams=streams)
        card = hub.pack(str(save), TERMS).files["README.md"].decode()
        plain = 'WanTransformer3DModel.from_pretrained("me/flames", subfolder="transformer")' in card
        assert (plain, "cannot make the companions" in card) == (streams == 1, streams == 2)
        assert "ComfyUI" not in card and "Step 30." in card


def test_the_card_says_the_scopes_that_the_adapter_has(tmp_path: Path) -> None:
    save = save_adapter(tmp_path / "step30")
    adapter = adapter_files.read_adapter(save)
    odd = {"blocks.0.cross_attn.o": "all"}  # of an adapter that training started from
    adapter_files.write_adapter(dataclasses.replace(adapter, scopes={**adapter.scopes, **odd}), save)
    assert "scope aux and all, on" in hub.pack(str(save), TERMS).files["README.md"].decode()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (BASE, BASE),
        ("/root/hub/models--Wan-AI--Wan2.1-T2V-14B/snapshots/0a1b", "Wan-AI/Wan2.1-T2V-14B"),
        ("/models/wan", ""),
    ],
)
def test_the_base_is_named_where_its_path_says_it(path: str, found: str) -> None:
    assert hub._base_of(path) == found


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("token", "said"), [("hf_wrong", "rejects the token"), (READER, "may not write")])
def test_a_token_that_will_not_do_is_the_users_to_mend(
    run: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, token: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert cli.main(["push", str(run), "--repo", "me/flames"]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1 and token not in shown


def test_without_a_token_nobody_is_asked(run: Path, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="hf auth login"):
        hub.push(hub.pack(str(run), TERMS))
    assert not server.requests


def test_a_hub_that_cannot_be_reached_is_a_fault(
    run: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["push", str(run), "--repo", "me/flames"]) == 1
    shown = capsys.readouterr().err
    assert "did not arrive" in shown and shown.count("\n") == 1


def test_a_card_that_the_hub_refuses_is_the_users_to_mend(run: Path, server: Hub) -> None:
    with pytest.raises(UserError, match="refuses me/flames"):
        hub.push(hub.pack(str(run), dataclasses.replace(TERMS, license="No Licence!")))


@pytest.mark.parametrize("options", [["--repo", "flames"], ["--repo", "me/flames", "--base", "/models/wan"]])
def test_what_is_no_hub_id_is_refused(run: Path, options: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["push", str(run), *options]) == 2
    assert "user/name" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for source in ("output/latest", "runs/first"):
        assert cli.main(["push", source, "--repo", "me/flames"]) == 2
        assert f"{source}: no such run, save or adapter here; train first" in capsys.readouterr().err
    assert not server.requests


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_everything_and_asks_nobody(run: Path, server: Hub, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["push", str(run), "--repo", "me/flames", "--base", BASE, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(path in shown for path in hub.pack(str(run), TERMS).files) and f"base_model: {BASE}" in shown
    assert not server.requests


def test_the_token_appears_in_no_file_and_no_log(run: Path, tmp_path: Path) -> None:
    with serving() as server:
        env = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        env |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "HF_DEBUG": "0"}
        command = [sys.executable, "-m", "transpixeler", "push", str(run), "--repo", "me/flames", "--public"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{server.endpoint}/me/flames" and not server.private["me/flames"]
    written = [file.read_bytes() for place in (tmp_path, run) for file in place.rglob("*") if file.is_file()]
    everything = [done.stdout.encode(), done.stderr.encode(), *written, *server.repos["me/flames"].values()]
    assert not [part for part in everything if TOKEN.encode() in part]


# --- and back again --------------------------------------------------------------------------------------------------


def save_model(folder: Path, *, base: Path, streams: int = 2) -> Path:
    """A save of a model that was trained in full, as training leaves it."""
    names = {"rgb": "", "seg": "_seg"} if streams == 2 else {"rgb": ""}
    metadata = {"base_model": str(base), "streams": ",".join(names), "fill": "keep", "step": "30", "ema": "false"}
    merge.save_model(tiny(streams, seed=7).named_parameters(), folder, model=wan_folder(TINY), metadata=metadata)
    model, lora = ModelConfig(path=str(base), rgb_attends_aux=False), LoraConfig(enabled=False)
    config = dataclasses.replace(Config(), model=model, lora=lora, streams=names)
    (folder / "config.yaml").write_text(loading.dump(config))
    return folder


def computed(found: saves.SavedModel) -> dict[str, torch.Tensor]:
    """Every weight of the model that is sampled."""
    with runtime.running(device="cpu") as here:
        mesh = meshes.build(meshes.resolve(found.config.parallel, 1), here)
        return {name: value.detach().clone() for name, value in open_engine(found, mesh).named_parameters()}


@pytest.mark.parametrize("full", [True, False])
def test_what_is_on_the_hub_is_sampled_as_what_was_pushed(full: bool, server: Hub, tmp_path: Path) -> None:
    base, save = tmp_path / "wan", tmp_path / "step30"
    merge.save_model(tiny(1).named_parameters(), base, model=wan_folder(TINY))
    save = save_model(save, base=base) if full else save_adapter(save, base=str(base))
    hub.push(hub.pack(str(save), TERMS))
    here, there = saves.load_saved(str(save)), saves.load_saved("me/flames", [f"model.path={base}"])
    assert (there.name, there.step, there.run) == ("me/flames", 30, None)
    assert (there.config.model, there.config.streams) == (here.config.model, here.config.streams)
    found, expected, bare = computed(there), computed(here), computed(saves.base_model(here.config))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(name not in bare or not torch.equal(bare[name], value) for name, value in expected.items())


# --- while training --------------------------------------------------------------------------------------------------


def pusher(**options) -> hub.Pusher:
    made = hub.pusher(dataclasses.replace(Config(), hub=HubConfig(repo="me/flames", **options)))
    assert made is not None
    return made


def test_a_failing_push_warns_and_the_next_one_goes(run: Path, server: Hub, caplog: pytest.LogCaptureFixture) -> None:
    made = pusher()
    with caplog.at_level(logging.INFO, logger="transpixeler"):
        made.saved(run / "no-such-save")
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.02)
        made.saved(run / "step30")
        made.close()
    warning, told = caplog.records
    assert warning.levelname == "WARNING" and "training goes on" in warning.message
    assert "step30 is at" in told.message and "adapter_model.safetensors" in server.repos["me/flames"]


def test_every_other_save_goes_and_of_those_that_wait_the_newest(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []

    def slowly(self: hub.Pusher, folder: Path) -> None:
        time.sleep(0.2)
        pushed.append(folder.name)

    monkeypatch.setattr(hub.Pusher, "_push", slowly)
    made = pusher(every_saves=2)
    for number in range(1, 9):
        made.saved(run / f"step{number}")
        time.sleep(0.02)
    made.close()
    assert pushed == ["step2", "step8"]


@pytest.mark.parametrize("saves", [1, 3, 4])
def test_the_last_save_goes_once_whatever_its_number(saves: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(hub.Pusher, "_push", lambda self, folder: pushed.append(folder.name))
    made = pusher(every_saves=2)
    for number in range(1, saves + 1):
        made.saved(run / f"step{number}")
    made.close()
    assert pushed[-1:] == [f"step{saves}"] and len(set(pushed)) == len(pushed)


def test_nothing_is_pushed_unless_a_repo_is_named() -> None:
    assert hub.pusher(Config()) is None
    with pytest.raises(UserError, match=r"hub\.repo"):
        loading.from_overrides(["hub.repo=flames"])
