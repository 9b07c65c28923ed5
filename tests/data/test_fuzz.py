"""Whatever lies in a data folder, the answer is a sample or a reason: never another exception, a crash or a hang."""

import os
import struct
import time
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.sources.test_pairs import write_sound
from tests.support.media import write_marked
from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.decode import probe
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.exr import write_exr_sequence
from transpixeler.data.sources.pairs import decode_pair, scan
from transpixeler.data.sources.samples import Sample

MUTATIONS = 500
LONGEST_SECONDS = 5.0


def seeds(folder: Path) -> list[Path]:
    """One small whole file of each kind."""
    kinds = {
        "a.mp4": ("libx264", "yuv420p"),
        "b.mkv": ("libx264", "yuv420p"),
        "c.mov": ("prores_ks", "yuva444p10le"),
        "d.webm": ("libvpx-vp9", "yuv420p"),
        "e.avi": ("mpeg4", "yuv420p"),
        "f.gif": ("gif", "gray"),
        "g.ts": ("libx264", "yuv420p"),
    }
    for name, (codec, pixels) in kinds.items():
        write_marked(folder / name, range(8), fps=Fraction(16), codec=codec, pixels=pixels)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8))
    for name in ("h.png", "i.jpg", "j.webp", "k.bmp", "l.tiff"):
        (picture if name != "i.jpg" else picture.convert("RGB")).save(folder / name)
    picture.save(folder / "m.webp", save_all=True, append_images=[picture.rotate(180)] * 3, duration=60)
    light = np.asarray(picture) / 255.0
    write_exr_sequence(folder / "made", [light], fps=Fraction(16), alpha_mode="straight")
    (folder / "made/00000.exr").rename(folder / "n.exr")
    (folder / "made").rmdir()
    write_dpx(folder / "o.dpx", np.asarray(picture))
    return sorted(folder.iterdir())


def write_dpx(path: Path, picture: np.ndarray) -> None:
    import av

    encoder = av.CodecContext.create("dpx", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgba", Fraction(1)
    frame = av.VideoFrame.from_ndarray(picture, format="rgba")
    frame.pts = 0
    path.write_bytes(b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None))))


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Cut short, zeroed, flipped, swapped, stretched or with absurd numbers in it."""
    broken = bytearray(data)
    spot = int(random.integers(len(data)))
    match int(random.integers(6)):
        case 0:
            return data[:spot]
        case 1:
            end = spot + int(random.integers(1, 400))
            broken[spot:end] = bytes(len(broken[spot:end]))
        case 2:
            for place in random.integers(0, len(data), int(random.integers(1, 60))):
                broken[place] ^= 1 << int(random.integers(8))
        case 3:
            broken[spot:spot] = random.bytes(int(random.integers(1, 2000)))
        case 4:
            for place in random.integers(0, min(len(data), 600), int(random.integers(1, 12))):
                broken[place] = int(random.choice([0, 1, 127, 128, 255]))
        case 5:
            del broken[spot : spot + int(random.integers(1, 300))]
    return bytes(broken)


def png(width: int, height: int) -> bytes:
    """A whole header that promises any size, over next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def media_cases(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of all that can be wrong with a file."""
    random = np.random.default_rng(7)
    files = [(path.suffix, path.read_bytes()) for path in seeds(folder)]
    endings = [suffix for suffix, _ in files]
    for i, (suffix, data) in enumerate(files):  # wrong extensions, nothing, almost nothing
        yield f"wrong{i}{endings[(i + 1) % len(files)]}", data
        yield f"wronger{i}{endings[(i + 5) % len(files)]}", data
        yield f"empty{i}{suffix}", b""
        yield f"zeros{i}{suffix}", bytes(4096)
        yield f"head{i}{suffix}", data[:16]
        yield f"noise{i}{suffix}", random.bytes(3000)
    for size in ((1, 1), (100_000, 1), (1, 100_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (0, 5), (16_000, 4_000)):
        yield f"size{size[0]}x{size[1]}.png", png(*size)
        yield f"film{size[0]}x{size[1]}.mp4", png(*size)
    write_sound(folder / "sound.mp4")
    yield "sound.mp4", (folder / "sound.mp4").read_bytes()
    yield "playlist.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    yield "concat.mp4", b"ffconcat version 1.0\nfile a.mp4\n"
    for i in range(MUTATIONS):
        suffix, data = files[i % len(files)]
        yield f"mutant{i}{suffix}", mutated(data, random)


def use(path: Path) -> str:
    """What training would do with a file: probe it, and decode a clip where that went well."""
    try:
        media = probe(path)
        sample = Sample("a", (("rgb", path), ("seg", path)), "a", 0, media.alpha, media)
        clip = Clip("a", Fraction(0), media.frames_at(Fraction(16)), Fraction(16), 16, 32)
        if media.frames_at(Fraction(16)) > 500:
            return "long"
        decoded = decode_pair(sample, clip)
        assert {frames.shape for frames in decoded.values()} == {(clip.frames, 16, 32, 3)}
    except BadMedia as error:
        assert str(error) and "\n" not in str(error)
        return "bad"
    return "good"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of what it forgives
def test_every_mutated_file_is_used_or_named(tmp_path: Path) -> None:
    (tmp_path / "seeds").mkdir()
    results = {"good": 0, "bad": 0, "long": 0}
    for name, content in media_cases(tmp_path / "seeds"):
        path = tmp_path / name
        path.write_bytes(content)
        start = time.monotonic()
        results[use(path)] += 1
        assert time.monotonic() - start < LONGEST_SECONDS, name
        path.unlink()
    assert sum(results.values()) > MUTATIONS + 80 and results["bad"] > 250 and results["good"] > 50, results


def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    for width, height in ((100_000, 1), (30_000, 30_000), (16_000, 16_000), (2_000, 20)):
        (tmp_path / "a.png").write_bytes(png(width, height))
        with pytest.raises(BadMedia, match=f"is {width}×{height}|exceeds limit"):
            probe(tmp_path / "a.png")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    for name in ("pipe.mp4", "folder.mp4", "dangling.mp4", "nul\0.mp4", "x" * 5000 + ".mp4"):
        with pytest.raises(BadMedia):
            probe(tmp_path / name)


MANIFESTS = {
    "csv": """rgb,seg,text,num_frames,height,width,fps
a.mp4,b.mp4,"one, two",8,32,96,16
c.mp4,d.mp4,"three
four",8,32,96,24000/1001
""",
    "jsonl": """{"video": "a.mp4", "seg": "b.mp4", "text": "one"}
{"rgb": "c.mp4", "seg": "d.mp4", "text": "zwei “2”", "fps": 16}
""",
}
POISON = [
    b"\0",
    b"\xff\xfe",
    b'"',
    b"\n",
    b",",
    b"{",
    b"[[[[",
    b"1e999",
    b"NaN",
    b"null",
    b"-1",
    b"../../x",
    b"\r",
    b"{}" * 50,
]


def manifest_cases() -> Iterator[tuple[str, bytes]]:
    random = np.random.default_rng(3)
    texts = {ending: text.encode() for ending, text in MANIFESTS.items()}
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"rgb": ["a.mp4", None], "seg": ["b.mp4", "c"], "text": ["one", "two"]}), sink)
    texts["parquet"] = sink.getvalue().to_pybytes()
    for ending, data in texts.items():
        yield ending, b""
        yield ending, bytes(300)
        yield ending, random.bytes(900)
        yield ending, b"[" * 100_000
        for i in range(MUTATIONS // 3):
            spot = int(random.integers(len(data)))
            poison = POISON[int(random.integers(len(POISON)))]
            yield ending, mutated(data, random) if i % 2 else data[:spot] + poison + data[spot + i % 3 :]


@pytest.mark.slow
def test_every_mutated_manifest_is_read_or_named(tmp_path: Path) -> None:
    write_marked(tmp_path / "a.mp4", range(8), fps=Fraction(16))
    for name in "bcd":
        (tmp_path / f"{name}.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    kinds = {"sample": 0, "named": 0, "refused": 0, "cases": 0}
    for ending, content in manifest_cases():
        path = tmp_path / f"list.{ending}"
        path.write_bytes(content)
        kinds["cases"] += 1
        try:
            found = scan([SourceConfig(str(path))], {"rgb": "", "seg": "_seg"}, DataConfig())
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            kinds["refused"] += 1
        else:
            kinds["sample"] += bool(found.samples)
            kinds["named"] += bool(found.bad)
    assert kinds["cases"] >= MUTATIONS and min(kinds.values()) > 20, kinds
