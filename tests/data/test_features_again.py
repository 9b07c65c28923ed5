"""Features on several ranks, of companions of another size, and exported again: the records are always the same."""

import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data.test_features import ENDS, same, taken, values
from tests.support.encoding import Counted, config, records, run, write_pair, write_pairs
from tests.support.ranks import run_ranks
from transpixeler.config.sections import Config, UserError
from transpixeler.data.cache.records import Cache
from transpixeler.data.dataset import Datasets
from transpixeler.data.encode import encode_missing
from transpixeler.data.features.export import export
from transpixeler.data.features.files import open_features
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime

HALF = "streams={rgb: '', seg: {suffix: _seg, scale: 2}}"


@pytest.fixture(scope="module", params=["equal", "half"])
def made(request, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Datasets, tuple[str, ...]]:
    """Lend exported features, the sets they are of, and what a config of them says; companions of both sizes."""
    root, more = tmp_path_factory.mktemp("made"), (ENDS, *([HALF] if request.param == "half" else []))
    write_pairs(root / "clips")
    wanted = config(demo_model, root / "clips", *more)
    datasets = run(wanted)
    export(datasets, open_model(wanted.model), root / "features")
    return root / "features", datasets, more


def _take(rank: int, world_size: int, setup: Config) -> int:
    return len(
        encode_missing(setup, open_model(setup.model), Runtime(rank, world_size, rank, torch.device("cpu"))).train.items
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_takes_the_same_records(
    made: tuple[Path, Datasets, tuple[str, ...]], demo_model: Path, tmp_path: Path, ranks: int
) -> None:
    folder, encoded, more = made
    alone = taken(demo_model, folder, tmp_path / "alone", *more)
    setup = config(demo_model, folder / "train.jsonl", f"data.cache_dir={tmp_path / 'many'}", *more)
    assert run_ranks(_take, ranks, setup) == [6] * ranks
    found = records(Cache(tmp_path / "many"))
    assert found == records(alone.train.cache)
    assert sorted(found.values()) == sorted(records(encoded.train.cache).values())
    assert len(list((tmp_path / "many").glob("*.idx"))) == ranks, "each wrote a share"


def test_a_companion_at_half_the_size_is_taken_as_it_was_encoded(
    made: tuple[Path, Datasets, tuple[str, ...]], demo_model: Path, tmp_path: Path, counted: Counted
) -> None:
    folder, encoded, more = made
    data = taken(demo_model, folder, tmp_path / "c", *more, "data.on_bad=error").train
    assert same(values(encoded.train), values(data)) and counted.loads == []
    side = 2 if HALF in more else 4
    file = load_file(sorted((folder / "train").iterdir())[0])
    assert file["latent"].shape[-2:] == (4, 4) and file["seg_latent"].shape[-2:] == (side, side)
    other = (ENDS,) if HALF in more else (ENDS, HALF)  # the broken twin: at the other scale none fits
    with pytest.raises(UserError, match=r"its seg_latent .* has the shape"):
        taken(demo_model, folder, tmp_path / "other", *other, "data.on_bad=error")


def test_features_that_are_exported_again_are_the_same(
    made: tuple[Path, Datasets, tuple[str, ...]], demo_model: Path, tmp_path: Path, counted: Counted
) -> None:
    """Twice through: the same files, and clips with the same ids and keys."""
    folder, encoded, more = made
    model = open_model(config(demo_model, folder).model)
    first = taken(demo_model, folder, tmp_path / "a", *more)
    export(first, model, tmp_path / "second")
    second = taken(demo_model, tmp_path / "second", tmp_path / "b", *more)
    export(second, model, tmp_path / "third")
    third = taken(demo_model, tmp_path / "third", tmp_path / "c", *more)
    for again in (second, third):
        assert same(values(encoded.train), values(again.train))
        assert again.train.items == first.train.items and again.train.prompts == first.train.prompts
        assert records(again.train.cache) == records(first.train.cache)
    files = [
        {path.relative_to(at): path.read_bytes() for path in at.rglob("*.*")}
        for at in (folder, tmp_path / "second", tmp_path / "third")
    ]
    assert files[0] == files[1] == files[2] and counted.loads == []


def test_several_sources_that_are_exported_again_keep_their_names(demo_model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_pair(tmp_path / name, "clip", len(name) + ord(name[0]))
    wanted = config(demo_model, tmp_path, f"data.train=[{tmp_path / 'one'}, {tmp_path / 'two'}]")
    model = open_model(wanted.model)
    export(run(wanted), model, tmp_path / "f")
    sources = [f"{tmp_path}/f/train-{name}.jsonl" for name in ("one", "two")]
    again = run(config(demo_model, tmp_path, f"data.train=[{', '.join(sources)}]", f"data.cache_dir={tmp_path / 'c'}"))
    made = export(again, model, tmp_path / "g")
    assert [one.path.name for one in made] == ["train-one.jsonl", "train-two.jsonl"]
    assert [path.read_bytes() for path in map(Path, sources)] == [one.path.read_bytes() for one in made]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_threads_that_open_old_files_leave_warnings_as_they_were(demo_model: Path, tmp_path: Path) -> None:
    """What Python warns of is of all threads: set in one of them, it stays set when they overlap."""
    old = torch.quantize_per_tensor(torch.randn(64, 64), 0.1, 0, torch.qint8)
    paths = [tmp_path / f"{number}.pt" for number in range(64)]
    for path in paths:
        torch.save(old, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage")
        before, barrier = list(warnings.filters), threading.Barrier(8)

        def work(own: list[Path]) -> None:
            barrier.wait()
            for path in own:
                open_features(path)

        threads = [threading.Thread(target=work, args=(paths[n::8] * 6,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == before


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_scan_warns_of_no_old_file_and_of_all_else(demo_model: Path, tmp_path: Path) -> None:
    torch.save(torch.quantize_per_tensor(torch.randn(64, 64), 0.1, 0, torch.qint8), tmp_path / "a.pt")
    (tmp_path / "m.jsonl").write_text('{"latent": "a.pt", "seg_latent": "a.pt", "text": "x"}\n' * 3)
    wanted = config(demo_model, tmp_path / "m.jsonl")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match=r"no usable clip|holds"):
            run(wanted).train.order(seed=0, global_batch=1)
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in told if "TypedStorage" in str(one.message)] == []
    assert "another" in [str(one.message) for one in told]
