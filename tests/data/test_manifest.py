"""Manifests from CSVs and folders, and a sentence for everything that can be wrong with them."""

from __future__ import annotations

import gzip
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from copynce.data import Manifest, Quarantine, read_manifest
from copynce.errors import DataError
from dali_pipelines import read_picture


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    touch(tmp_path, "pictures/b.jpg", "a.anything")
    manifest = read_manifest(write(tmp_path / "list.csv", "uuid,path\nB,pictures/b.jpg\nA,./a.anything\n"))
    assert manifest == Manifest(["B", "A"], [tmp_path / "pictures/b.jpg", tmp_path / "a.anything"], tmp_path)
    assert len(manifest) == 2


@pytest.mark.parametrize(
    "text",
    [
        "path,note,uuid\na.jpg,x,A\n",  # other order, more columns
        "\ufeffuuid,path\r\nA,a.jpg\r\n",  # as a spreadsheet saves it
        "uuid, path\n\nA, a.jpg\n\n",  # blanks and blank lines
        'uuid,path\n"A","a.jpg"',
        "uuid,path\nA,x/../a.jpg\n",  # does not leave the folder
    ],
)
def test_csv_dialects(tmp_path: Path, text: str) -> None:
    touch(tmp_path, "a.jpg")
    manifest = read_manifest(write(tmp_path / "list.csv", text))
    assert (manifest.uuids, manifest.paths) == (["A"], [tmp_path / "a.jpg"])


def test_json_list_of_file_names(tmp_path: Path) -> None:
    touch(tmp_path, "training_images/T1.jpg", "training_images/more/T0.png")
    path = write(tmp_path / "train.json", '["T1.jpg", "more/T0.png"]')
    manifest = read_manifest(path, root=tmp_path / "training_images")
    assert manifest.uuids == ["T1", "more/T0"]
    assert manifest.paths == [tmp_path / "training_images/T1.jpg", tmp_path / "training_images/more/T0.png"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[", "no JSON"),
        ("{}", "expected a JSON list of file names, got a dict"),
        ("[]", "got an empty list"),
        ('["a.jpg", 3]', "entry 2: expected the name of a file, got 3"),
        ('["a.jpg", "a.png"]', "entry 2: 'a.png' has the uuid 'a' of entry 1"),
        ('["../a.jpg"]', "entry 1: path .* must be relative"),
        ('["a.jpg", "b.jpg"]', r"1 of 2 files not found in .*: b.jpg \(entry 2\)"),
    ],
)
def test_json_lists_that_are_wrong(tmp_path: Path, text: str, told: str) -> None:
    touch(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=told):
        read_manifest(write(tmp_path / "list.json", text))


def test_csv_with_another_root(tmp_path: Path) -> None:
    touch(tmp_path, "pictures/a.jpg")
    (tmp_path / "lists").mkdir()
    path = write(tmp_path / "lists" / "list.csv", "uuid,path\nA,a.jpg\n")
    assert read_manifest(path, root=tmp_path / "pictures").paths == [tmp_path / "pictures/a.jpg"]
    with pytest.raises(DataError, match="1 of 1 files not found"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.csv: the file is empty; expected a CSV that starts with the line uuid,path"),
        ("uuid,path\n", "list.csv: the file lists no picture"),
        ("A,a.jpg\n", "list.csv, line 1: no column uuid and path; expected a header uuid,path, got 'A,a.jpg'"),
        ("uuid,file\nA,a.jpg\n", "list.csv, line 1: no column path"),
        ("uuid,path\nA\n", r"list.csv, line 2: expected 2 fields \(uuid,path\), got \['A'\]"),
        ("uuid,path\nA,a.jpg,\n", "list.csv, line 2: expected 2 fields"),
        ("uuid,path\n,a.jpg\n", "list.csv, line 2: uuid is empty"),
        ("uuid,path\nA, \n", "list.csv, line 2: path is empty"),
        ("uuid,path\nA,a.jpg\n\nA,b.jpg\n", "list.csv, line 4: duplicate uuid 'A', first given on line 2"),
        ("uuid,path\nA,/etc/passwd\n", "list.csv, line 2: path '/etc/passwd' must be relative"),
        ("uuid,path\nA,../a.jpg\n", "list.csv, line 2: path '../a.jpg' must be relative and stay inside"),
        ("uuid,path\nA,x/../../a.jpg\n", "list.csv, line 2: path 'x/../../a.jpg' must be"),
        ("uuid,path\nA,.\n", "list.csv, line 2: path '.' must be"),
        ("uuid,path\nA,a.jpg\0\n", "list.csv, line 2: "),
        ("uuid,path\nA," + "x" * 200_000 + "\n", "list.csv, line 2: not a CSV line"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    path = write(tmp_path / "list.csv", text)
    with pytest.raises(DataError, match=message):
        read_manifest(path)


def test_missing_files_are_counted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg")
    (tmp_path / "in" / "folder.jpg").mkdir()
    (tmp_path / "in" / "link.jpg").symlink_to("nowhere")
    lines = [f"M{i},gone/{i}.jpg" for i in range(6)]
    lines += ["A,in/a.jpg", "F,in/folder.jpg", "L,in/link.jpg", "X,in/a.jpg/x"]
    path = write(tmp_path / "list.csv", "\n".join(["uuid,path", *lines]) + "\n")
    expected = r"9 of 10 files not found in .*: gone/0.jpg \(line 2\), .*gone/4.jpg \(line 6\) and 4 more$"
    with pytest.raises(DataError, match=expected):
        read_manifest(path)


def test_a_picture_given_as_csv(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(bytes(range(256)) * 10)
    with pytest.raises(DataError, match=r"picture\.jpg, line "):
        read_manifest(path)


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: no such file or folder"):
        read_manifest(tmp_path / "gone.csv")


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    (tmp_path / "list.csv").write_bytes(b"uuid,path\nA,caf\xe9.jpg\n")
    assert read_manifest(tmp_path / "list.csv").paths == read_manifest(tmp_path).paths


def test_folder_is_read_recursively_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "z.JPG", "b/c/x.webp", "b/a.png", "notes.txt", "b/.hidden.jpg", ".cache/y.jpg", "LICENSE")
    manifest = read_manifest(str(tmp_path))
    assert manifest.uuids == ["b/a", "b/c/x", "z"]
    assert manifest.paths == [tmp_path / "b/a.png", tmp_path / "b/c/x.webp", tmp_path / "z.JPG"]
    assert manifest.root == tmp_path
    assert manifest.ignored == 3  # a hidden folder is not entered


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "JPEG"])
def test_suffixes(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, f"a.{suffix}")
    assert read_manifest(tmp_path).uuids == ["a"]


def test_folder_uuids_that_would_clash_keep_their_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.png", "a.jpg.png", "b.v1.jpg", "c.jpg")
    assert read_manifest(tmp_path).uuids == ["a.jpg", "a.jpg.png", "a.png", "b.v1", "c"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "circle").symlink_to(tmp_path / "data")
    assert read_manifest(tmp_path / "data").uuids == ["linked/a"]


def pixels() -> Image.Image:
    return Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).reshape(30, 40, 3).astype(np.uint8))


FORMATS = ["JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "TGA"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["a", "a.dng", "a.jpg_large", "a.jpg?x=1", "a.img", "a.heic"])
def test_pictures_are_known_by_their_content(tmp_path: Path, format: str, name: str) -> None:
    pixels().save(tmp_path / name, format)
    if format == "TGA":  # the footer of its second version tells it, and nothing else
        with (tmp_path / name).open("ab") as file:
            file.write(bytes(8) + b"TRUEVISION-XFILE.\0")
    manifest = read_manifest(tmp_path)
    assert manifest.paths == [tmp_path / name]
    assert read_picture(manifest.paths[0]).shape == (30, 40)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif_is_known_by_its_content(tmp_path: Path) -> None:
    pixels().save(tmp_path / "a.heif", "AVIF")
    assert read_manifest(tmp_path).uuids == ["a"]


def test_what_is_left_out_is_counted_by_suffix(tmp_path: Path) -> None:
    names = ["1.txt", "2.TXT", "a.json", "LICENSE", "odd.xyz", ".hidden.jpg", "._a.jpg", "short.tga2"]
    touch(tmp_path, "a.jpg", *names, "__MACOSX/._b.jpg", "x/PaxHeaders.77/c.jpg", "@eaDir/a.jpg/thumb.jpg")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99))
    (tmp_path / "new.jxl").write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99))
    for name, text in {"p.cfg": "P1 is better", "bm.cfg": "BM is not enough" * 9, "riff.cfg": "RIFF....WAVE"}.items():
        (tmp_path / name).write_text(text)
    manifest = read_manifest(tmp_path)
    assert manifest.uuids == ["a"]
    assert manifest.left_out == {
        **{".txt": 2, ".json": 1, "without suffix": 1, ".xyz": 1, ".tga2": 1, ".cfg": 3, "hidden": 2},
        **{"HEIC pictures, which cannot be decoded here": 1, "JPEG XL pictures, which cannot be decoded here": 1},
        **{"folder __MACOSX": 1, "folder PaxHeaders.77": 1, "folder @eaDir": 1},
    }
    said: list[str] = []
    manifest.report(said.append, lambda path, reason: pytest.fail("all are files"))
    (line,) = said
    assert line.startswith(f"{tmp_path}: 1 pictures; 16 files left out: 3 .cfg, 2 ")
    assert line.endswith(" and 4 others")
    assert "\n" not in line
    manifest.select([0]).report(said.append, lambda path, reason: None)
    assert len(said) == 1, "a selection is no folder"


def test_what_is_no_file_is_never_opened_and_listed(tmp_path: Path) -> None:
    """A pipe that is opened waits for a writer for ever; pictures in a folder of a picture's name are not lost."""
    touch(tmp_path, "a.jpg", "folder.jpg/b.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "shards.tar")
    (tmp_path / "link to pipe.png").symlink_to("pipe")
    (tmp_path / "dangling.jpg").symlink_to("/nowhere/gone.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.jpg"))
    manifest = read_manifest(tmp_path)
    assert manifest.uuids == ["a", "folder.jpg/b"]
    assert manifest.left_out == {"a named pipe": 4, "a link to nothing": 2, "a device": 1, "a socket": 1}
    quarantine = Quarantine()
    manifest.report(lambda line: None, quarantine.add)
    assert {Path(path).name: reason for path, reason in quarantine.entries()} == {
        "pipe.jpg": "a named pipe, no file",
        "link to pipe.png": "a named pipe, no file",
        "dangling.jpg": "a link to nothing, no file",
        "circle.jpg": "a link to nothing, no file",
        "device.jpg": "a device, no file",
        "socket.jpg": "a socket, no file",
        "folder.jpg": "a folder, no file",
    }
    # In a list each is an error that says what it is, and so is a list or a shard that is none.
    (tmp_path / "list.csv").write_text("uuid,path\nA,a.jpg\nP,pipe.jpg\nD,dangling.jpg\nC,circle.jpg\nF,folder.jpg\n")
    with pytest.raises(
        DataError, match=r"pipe\.jpg, a named pipe \(line 3\), dangling\.jpg, a link to nothing \(line 4"
    ):
        read_manifest(tmp_path / "list.csv")
    for name, what in {"pipe": "a named pipe", "shards.tar": "a named pipe", "circle.jpg": "a link to nothing"}.items():
        with pytest.raises(DataError, match=f"{name}: {what}; expected a CSV"):
            read_manifest(tmp_path / name)


@pytest.mark.parametrize("address", ["https://example.org/a.csv", "s3://bucket/x-{000..003}.tar", "pipe:cat x.tar"])
def test_addresses_are_no_files(address: str) -> None:
    with pytest.raises(DataError, match="an address, and pictures are read from files: copy or mount them"):
        read_manifest(address)


def test_a_list_that_is_something_else_says_what(tmp_path: Path) -> None:
    pixels().save(tmp_path / "a.jpg")
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress(b"uuid,path\nA,a.jpg\n"))
    with pytest.raises(DataError, match=r"a\.jpg: a JPEG picture; expected a CSV"):
        read_manifest(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"list\.csv\.gz: a compressed file; unpack it with gunzip"):
        read_manifest(tmp_path / "list.csv.gz")
    (tmp_path / "packed").mkdir()
    (tmp_path / "list.csv.gz").rename(tmp_path / "packed" / "shard.tar.gz")
    with pytest.raises(DataError, match=r"its 1 files are of other kinds: 1 \.gz\).*unpack archives first"):
        read_manifest(tmp_path / "packed")


def test_a_name_that_a_list_gives_with_a_blank_is_shown_with_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=r"1 of 1 files not found .*: 'a\.jpg ' \(line 2\)"):
        read_manifest(write(tmp_path / "list.csv", "uuid,path\nA,a.jpg \n"))


@pytest.mark.parametrize(
    ("names", "message"), [([], "it holds no files"), (["a.txt", "b/c.csv"], "its 2 files are of other kinds")]
)
def test_folder_without_pictures(tmp_path: Path, names: list[str], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=f"{tmp_path}: no picture in this folder.*{message}"):
        read_manifest(tmp_path)


def test_root_is_for_csv_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="root is for lists"):
        read_manifest(tmp_path, root=tmp_path)


def test_minidisc(minidisc: Path) -> None:
    manifest = read_manifest(minidisc / "train.csv")
    assert len(manifest) == len(set(manifest.uuids)) == 2530
    assert manifest.uuids == read_manifest(minidisc / "train").uuids
