"""Tar shards: manifests, the kept index, odd names, damage, and loaders that read them as they read files."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from copynce.data import Manifest, Quarantine, read_manifest
from copynce.data.pairs import DescriptorPairs, PairSampler
from copynce.data.shards import expand_shards, read_shard
from copynce.errors import DataError
from dali_pipelines import BrokenPicture, LoaderOptions, PairLoader, PictureLoader, ShardMember, read_picture


def write_shard(path: Path, files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def photographs(minidisc: Path) -> Manifest:
    """The first 24 training pictures as files."""
    return read_manifest(minidisc / "train.csv").select(range(24))


@pytest.fixture(scope="module")
def shards(photographs: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in three WebDataset shards, each picture with a JSON file beside it."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        files = {}
        for uuid, path in list(zip(photographs.uuids, photographs.paths, strict=True))[8 * shard : 8 * shard + 8]:
            files[f"{uuid}.jpg"] = Path(path).read_bytes()
            files[f"{uuid}.json"] = b"{}"
        write_shard(folder / f"train-{shard:03}.tar", files)
    return folder


def test_a_folder_of_shards_is_a_manifest(shards: Path, photographs: Manifest) -> None:
    manifest = read_manifest(shards)
    assert manifest.uuids == photographs.uuids
    assert [os.fspath(path) for path in manifest.paths[7:9]] == [
        f"{shards}/train-000.tar/T00007.jpg",
        f"{shards}/train-001.tar/T00008.jpg",
    ]
    assert (manifest.root, manifest.ignored) == (shards, 24)  # the JSON files
    for member, path in zip(manifest.paths, photographs.paths, strict=True):
        assert isinstance(member, ShardMember)
        assert member.read_bytes() == Path(path).read_bytes()
    # Nothing is extracted.
    assert sorted(path.name for path in shards.iterdir()) == sorted(
        f"train-{i:03}.tar{suffix}" for i in range(3) for suffix in ("", ".index.json")
    )


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("train-000.tar", [0]),
        ("train-*.tar", [0, 1, 2]),
        ("train-{000..002}.tar", [0, 1, 2]),
        ("train-{001..002}.tar", [1, 2]),
        ("train-{002,000}.tar", [2, 0]),
        ("train-00[12].tar", [1, 2]),
        ("train-0{0..0}{0..2}.tar", [0, 1, 2]),
        ("{train-*,train-001}.tar", [0, 1, 2]),  # none twice
    ],
)
def test_patterns(shards: Path, photographs: Manifest, pattern: str, numbers: list[int]) -> None:
    manifest = read_manifest(shards / pattern)
    assert manifest.uuids == [uuid for i in numbers for uuid in photographs.uuids[8 * i : 8 * i + 8]]
    assert manifest.root == shards


def test_a_pattern_may_span_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name / "x.tar", {f"{name}.jpg": b"x"})
    manifest = read_manifest(tmp_path / "{a,b}" / "x.tar")
    assert (manifest.uuids, manifest.root) == (["a", "b"], tmp_path)


def test_missing_shards_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-003\.tar: no such file, though .*train-\{000\.\.003\}\.tar names it"):
        read_manifest(shards / "train-{000..003}.tar")
    with pytest.raises(DataError, match=r"val-\*\.tar: no such file$"):
        read_manifest(shards / "val-*.tar")
    with pytest.raises(DataError, match=r"none\.tar: no such file or folder; expected a CSV .* or shards"):
        read_manifest(tmp_path / "none.tar")
    with pytest.raises(DataError, match=r"root is for lists of pictures, but .*train-\*\.tar is not one"):
        read_manifest(shards / "train-*.tar", root=shards)
    write_shard(tmp_path / "text.tar", {"a.txt": b"a", ".hidden.jpg": b"b", "__/._c.jpg": b"c"})
    with pytest.raises(DataError, match="no picture in 1 shards, their 3 files are of other kinds"):
        read_manifest(tmp_path / "text.tar")


def test_numbers_keep_their_zeros(tmp_path: Path) -> None:
    for name in ("8", "9", "10", "08", "09", "010"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in expand_shards(f"{tmp_path}/{{8..10}}")] == ["8", "9", "10"]
    assert [path.name for path in expand_shards(f"{tmp_path}/{{08..10}}")[:2]] == ["08", "09"]


def test_pictures_beside_a_shard_come_first(tmp_path: Path) -> None:
    """A tar among loose pictures is some archive, as it always was."""
    write_shard(tmp_path / "backup.tar", {"a.jpg": b"x"})
    (tmp_path / "a.jpg").write_bytes(b"x")
    manifest = read_manifest(tmp_path)
    assert (manifest.paths, manifest.ignored) == ([tmp_path / "a.jpg"], 1)


def test_samples_are_named_by_their_key(tmp_path: Path) -> None:
    files = dict.fromkeys(["./one.jpg", "two.seg.png", "deep/three.webp", "same.jpg", "other.JPG"], b"x")
    write_shard(tmp_path / "0.tar", files)
    write_shard(tmp_path / "1.tar", {"same.jpg": b"y"})
    manifest = read_manifest(tmp_path)
    assert manifest.uuids == ["one", "two", "deep/three", "0.tar/same.jpg", "other", "1.tar/same.jpg"]
    assert os.fspath(manifest.paths[0]) == f"{tmp_path}/0.tar/one.jpg"


def test_the_last_member_of_a_name_counts(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"a.jpg": b"old", "b.jpg": b"b"})
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"new"))
    found = read_shard(shard)
    assert {name: member.read_bytes() for name, member in found.items()} == {"b.jpg": b"b", "a.jpg": b"new"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(tmp_path: Path, format: int) -> None:
    names = ["a.jpg", "x" * 90 + "/" + "y" * 90 + ".jpg"]
    names += [] if format == tarfile.USTAR_FORMAT else ["ä" * 200 + ".jpg"]
    shard = write_shard(tmp_path / "0.tar", {name: name.encode() for name in names}, format)
    assert [member.read_bytes().decode() for member in read_shard(shard).values()] == names
    assert [member.name for member in read_shard(shard).values()] == names  # from the kept index


def test_only_regular_files_are_members(tmp_path: Path) -> None:
    """A link would lead out of the shard."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("folder.jpg", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("empty.jpg"))
    assert list(read_shard(tmp_path / "0.tar")) == ["empty.jpg"]
    with pytest.raises(BrokenPicture, match=r"0\.tar/empty\.jpg: the file is empty"):
        read_picture(read_manifest(tmp_path).paths[0])


def test_a_hard_link_is_the_file_that_it_leads_to(photographs: Manifest, tmp_path: Path) -> None:
    """tar writes a file of several names once, and its other names as links."""
    content = Path(photographs.paths[0]).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(content)
    os.link(tmp_path / "in" / "a.jpg", tmp_path / "in" / "b.jpg")
    (tmp_path / "in" / "c.jpg").symlink_to("a.jpg")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "in", "in")
    for _ in range(2):  # from its headers, then from the kept index
        manifest = read_manifest(tmp_path / "0.tar")
        assert manifest.uuids == ["in/a", "in/b"]
        assert [path.read_bytes() for path in manifest.paths] == [content, content]
        assert manifest.left_out == {"link": 1}, "a symbolic one may lead anywhere"


def test_members_are_known_by_their_content(photographs: Manifest, tmp_path: Path) -> None:
    content = Path(photographs.paths[0]).read_bytes()
    pictures = ["000", "e.img", "c.jpg?x=1", "b.jpeg;v=1", "d.jpg ", "f/g.heic"]
    others = ["000.cls", "LICENSE", "._a.jpg", "__MACOSX/a.jpg", "PaxHeader/x.jpg", "1.txt"]
    files = {**dict.fromkeys(pictures, content), **dict.fromkeys(others, b"1")}
    write_shard(tmp_path / "0.tar", files)
    manifest = read_manifest(tmp_path)
    assert manifest.uuids == ["000", "e", "c", "b", "d", "f/g"]
    assert all(path.read_bytes() == content for path in manifest.paths)
    assert manifest.left_out == {
        **{".cls": 1, "without suffix": 1, "hidden": 1, "in __MACOSX": 1, "in PaxHeader": 1, ".txt": 1}
    }


def test_brackets_and_braces_that_exist_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("[2024] set", "{a,b}", "2", "x*", "xy"):
        for name in ("s-0", "s-1", "[s]"):
            write_shard(tmp_path / folder / f"{name}.tar", {f"{folder}{name}.jpg": b"x"})
    for pattern, uuids in {
        "[2024] set/s-{0..1}.tar": ["[2024] sets-0", "[2024] sets-1"],
        "[2024] set/s-*.tar": ["[2024] sets-0", "[2024] sets-1"],
        "[2024] set/[s].tar": ["[2024] set[s]"],
        "[2024]/s-0.tar": ["2s-0"],
        "{a,b}/s-?.tar": ["{a,b}s-0", "{a,b}s-1"],
        "x*/s-0.tar": ["x*s-0"],
        "{2,[2024] set}/s-{1..0}.tar": ["2s-1", "2s-0", "[2024] sets-1", "[2024] sets-0"],
        "*/[s].tar": ["2[s]", "[2024] set[s]", "x*[s]", "xy[s]", "{a,b}[s]"],
        "**/s-0.tar": ["2s-0", "[2024] sets-0", "x*s-0", "xys-0", "{a,b}s-0"],
    }.items():
        assert read_manifest(pattern).uuids == uuids, pattern
        assert read_manifest(tmp_path / pattern).uuids == uuids, pattern
    assert read_manifest("[2024] set").uuids[0] == "[2024] set[s]"
    with pytest.raises(DataError, match=r"\[2024\] set/s-2\.tar: no such file, though \[2024\] set/s-\{0\.\.2\}\.tar"):
        read_manifest("[2024] set/s-{0..2}.tar")


def test_a_shard_is_known_by_its_content(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard", {"a.jpg": b"x"})
    assert read_manifest(tmp_path / "shard").uuids == ["a"]


def test_an_index_is_not_used_for_another_shard_of_the_same_size_and_time(tmp_path: Path) -> None:
    """As rsync -t and cp -p leave it."""
    shard = write_shard(tmp_path / "0.tar", {f"{i}.jpg": bytes([i]) * 600 for i in range(40)})
    read_shard(shard)
    status = shard.stat()
    write_shard(shard, {f"{39 - i}.jpg": bytes([39 - i]) * 600 for i in range(40)})
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shard.stat().st_size == status.st_size
    assert [(name, member.read_bytes()[:1]) for name, member in read_shard(shard).items()] == [
        (f"{39 - i}.jpg", bytes([39 - i])) for i in range(40)
    ]


def test_no_member_is_read_for_another(tmp_path: Path) -> None:
    """Where the index did not see that the shard is another, or it was replaced later, the reading does."""
    shard = write_shard(tmp_path / "0.tar", {f"{i:03}.jpg": b"x" * 600 for i in range(100)})
    status = shard.stat()
    members = read_shard(shard)
    names = list(members)
    names[1], names[2] = names[2], names[1]  # none of the headers that are looked at when the index is read
    write_shard(shard, dict.fromkeys(names, b"y" * 600))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = read_shard(shard)
    assert again == members
    assert again["000.jpg"].read_bytes() == b"y" * 600
    for name in names[1:3]:
        with pytest.raises(BrokenPicture, match=rf"{name}: cannot be read: the shard has changed since its files were"):
            read_picture(again[name])


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "b/../../a.jpg"])
def test_names_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / "0.tar", {"fine.jpg": b"x", name: b"x"})
    with pytest.raises(DataError, match=r"0\.tar: member '.*a\.jpg' must be relative and stay inside of the shard"):
        read_manifest(tmp_path)


def test_the_index_is_kept_until_the_shard_changes(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"a.jpg": b"a", "b.jpg": b"b"})
    read_shard(shard)
    kept = tmp_path / "0.tar.index.json"
    content = json.loads(kept.read_text())
    assert list(content["files"]) == ["a.jpg", "b.jpg"]
    del content["files"]["a.jpg"]
    kept.write_text(json.dumps(content))
    assert list(read_shard(shard)) == ["b.jpg"]  # it is read, not made anew
    os.utime(shard, ns=(1, 1))
    assert list(read_shard(shard)) == ["a.jpg", "b.jpg"]
    write_shard(shard, {"c.jpg": b"c"})
    assert list(read_shard(shard)) == ["c.jpg"]


@pytest.mark.parametrize(
    "files",
    ["[]", '{"a.jpg": [0]}', '{"a.jpg": [0, -1]}', '{"a.jpg": [0, 1e9]}', '{"a.jpg": [0, 999999]}', '{"../a": [0, 1]}'],
)
def test_an_index_that_cannot_be_used_is_made_anew(tmp_path: Path, files: str) -> None:
    shard = write_shard(tmp_path / "0.tar", {"a.jpg": b"a"})
    status = shard.stat()
    kept = tmp_path / "0.tar.index.json"
    kept.write_text(f'{{"size": {status.st_size}, "mtime_ns": {status.st_mtime_ns}, "files": {files}}}')
    assert read_shard(shard)["a.jpg"].read_bytes() == b"a"
    for text in ("", "{", "[" * 100_000, "null", '{"size": 1}'):
        kept.write_text(text)
        assert read_shard(shard)["a.jpg"].read_bytes() == b"a"


def test_an_index_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"a.jpg": b"a"})
    (tmp_path / "0.tar.index.json").mkdir()  # nothing can be renamed to it
    for _ in range(2):
        assert list(read_shard(shard)) == ["a.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "0.tar.index.json"]


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    files = {f"{i}.jpg": bytes([i]) * 3000 for i in range(1, 5)}
    whole = write_shard(tmp_path / "whole.tar", files).read_bytes()
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "whole.tar", "a.jpg")
    start = whole.index(b"\3" * 512) - 512  # the header of the third picture
    for name, content, message in (
        ("cut", whole[: start + 2000], r"cut\.tar: damaged after 3 files \(.*\); expected a WebDataset shard"),
        ("header", whole[:start] + b"?" * 512 + whole[start + 512 :], r"header\.tar: damaged after 2 files"),
        ("text", b"not a tar" * 1000, r"text\.tar: not an uncompressed tar"),
        ("empty", b"", r"empty\.tar: not an uncompressed tar \(empty file\)"),
        ("packed", (tmp_path / "packed.tar").read_bytes(), r"packed\.tar: not an uncompressed tar"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_manifest(tmp_path / f"{name}.tar")


def test_any_damage_ends_in_members_or_a_sentence(tmp_path: Path) -> None:
    """Bit flips, cuts and lies in headers: never another error, never an endless reading, never a place outside."""
    files = {f"folder/{'n' * 120}{i}.jpg": bytes([i]) * 700 for i in range(4)}
    generator = random.Random(0)
    accepted = 0
    for round_ in range(300):
        format = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[round_ % 2]
        shard = write_shard(tmp_path / f"{round_}.tar", files, format)
        content = bytearray(shard.read_bytes()[: 512 * 24])
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        if round_ % 3 == 0:
            content = content[: generator.randrange(len(content))]
        if round_ % 5 == 0:  # a size field with a sum that fits
            start = 512 * generator.randrange(max(len(content) // 512, 1))
            content[start + 124 : start + 136] = generator.choice([b"\xff" * 12, b"77777777777\0", b"-0000000100\0"])
            block = content[start : start + 512]
            block[148:156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(block)
        shard.write_bytes(content)
        try:
            members = read_shard(shard)
        except DataError as error:
            named = str(error).startswith(str(shard))
            members = {}
        else:
            named, accepted = True, accepted + 1
        assert named
        for member in members.values():
            assert 0 <= member.offset <= member.offset + member.size <= len(content)
    assert 0 < accepted < 300


def test_a_shard_that_shrinks_later_breaks_its_pictures_only(shards: Path, tmp_path: Path) -> None:
    content = (shards / "train-000.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content)
    manifest = read_manifest(tmp_path)
    (tmp_path / "0.tar").write_bytes(content[: len(content) // 2])
    read_picture(manifest.paths[0])
    with pytest.raises(BrokenPicture, match=r"0\.tar/T00007\.jpg: cannot be read: the shard ends \d+ bytes too early"):
        read_picture(manifest.paths[7])
    (tmp_path / "0.tar").unlink()
    with pytest.raises(BrokenPicture, match=r"0\.tar/T00000\.jpg: cannot be read: No such file"):
        read_picture(manifest.paths[0])


def test_a_csv_may_lead_into_shards(shards: Path, photographs: Manifest, tmp_path: Path) -> None:
    (tmp_path / "own.jpg").write_bytes(b"x")
    os.symlink(shards, tmp_path / "shards")
    list_ = tmp_path / "list.csv"
    list_.write_text("uuid,path\nA,shards/train-001.tar/T00009.jpg\nB,own.jpg\nC,shards/train-000.tar/./T00001.jpg\n")
    manifest = read_manifest(list_)
    assert manifest.uuids == ["A", "B", "C"]
    assert [type(path) for path in manifest.paths] == [ShardMember, type(tmp_path), ShardMember]
    assert manifest.paths[2].read_bytes() == Path(photographs.paths[1]).read_bytes()
    list_.write_text("uuid,path\nA,shards/train-001.tar/T00001.jpg\nB,shards/none.tar/a.jpg\n")
    with pytest.raises(DataError, match=r"2 of 2 files not found .*train-001\.tar/T00001\.jpg \(line 2\), .*none\.tar"):
        read_manifest(list_)
    # A folder may be called so, too.
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "folder.tar" / "a.jpg").write_bytes(b"x")
    list_.write_text("uuid,path\nA,folder.tar/a.jpg\n")
    assert read_manifest(list_).paths == [tmp_path / "folder.tar" / "a.jpg"]


def test_loaders_see_the_pictures_of_the_files(shards: Path, photographs: Manifest) -> None:
    quarantine = Quarantine()
    packed = read_manifest(shards)
    seen = [
        list(PictureLoader(manifest.paths, LoaderOptions(size=64, batch_size=10), on_broken=quarantine.add))
        for manifest in (packed, photographs)
    ]
    for (rows, pictures), (expected_rows, expected) in zip(*seen, strict=True):
        assert torch.equal(rows, expected_rows)
        assert torch.equal(pictures, expected)
    batches = []
    for manifest in (packed, photographs):
        plan = DescriptorPairs(manifest, "descriptor", 0)
        with PairLoader(
            PairSampler(plan, 6, seed=0).batches(0, 4),
            manifest.paths,
            LoaderOptions(size=64, batch_size=6),
            substitute=plan.substitute,
            on_broken=quarantine.add,
        ) as loader:
            batches.append(list(loader))
    for batch, expected_batch in zip(*batches, strict=True):
        assert batch.uuids == expected_batch.uuids
        for name in ("query", "reference", "query_to_reference", "reference_to_query"):
            assert torch.equal(getattr(batch, name), getattr(expected_batch, name)), name
    assert len(quarantine) == 0


def test_broken_members_are_listed_and_left_out(photographs: Manifest, tmp_path: Path) -> None:
    contents = [Path(path).read_bytes() for path in photographs.paths[:6]]
    files = {f"{i}.jpg": content for i, content in enumerate(contents)}
    files["1.jpg"] = contents[1][: len(contents[1]) // 2]
    files["4.jpg"] = b"no picture"
    write_shard(tmp_path / "0.tar", files)
    manifest = read_manifest(tmp_path)
    quarantine = Quarantine(tmp_path / "broken.jsonl")
    (batch,) = PictureLoader(manifest.paths, LoaderOptions(size=32, batch_size=6), on_broken=quarantine.add)
    assert batch[0].tolist() == [0, 2, 3, 5]
    assert sorted(path for path, _ in quarantine.entries()) == [f"{tmp_path}/0.tar/1.jpg", f"{tmp_path}/0.tar/4.jpg"]
    assert manifest.paths[1] in Quarantine(tmp_path / "broken.jsonl")
