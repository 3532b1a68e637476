"""What the store keeps, what it lets go, and what it makes of files that somebody has spoilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from garden_py.backend.boot import read_boot_id
from garden_py.backend.images.store import Image, ImageStore, Layer, Name
from garden_py.model.errors import ImageInUse, ImageUnknown
from garden_py.model.image import ImageConfig, RegistryAuth


def digest(letter: str) -> str:
    return f"sha256:{letter * 64}"


class Bench:
    """A store with a little that fills it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = self.again()

    def again(self) -> ImageStore:
        """The store as the next server finds it."""
        self.store = ImageStore(self.root, lambda path: shutil.rmtree(path, ignore_errors=True))
        self.store.open()
        return self.store

    def layer(self, letter: str, size: int = 100, *, boot: str = "") -> None:
        with self.store.staging() as staged:
            (staged / "fs").mkdir()
            (staged / "fs" / "file").write_text(letter)
            self.store.commit_layer(staged, Layer(digest(letter), size, boot or read_boot_id()))

    def image(self, letter: str, layers: str, name: str = "") -> Image:
        for each in layers:
            self.layer(each)
        image = Image(
            digest(letter), tuple(map(digest, layers)), ImageConfig(env=("A=1",)), "amd64", "linux", "", 1
        )
        return self.store.save_image(image, Name(name, image.id) if name else None)

    @property
    def layers(self) -> list[str]:
        return sorted(path.name[0] for path in (self.root / "layers").iterdir())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "images")


def test_what_is_kept_is_there_for_the_next_server(bench: Bench) -> None:
    bench.image("a", "12", "docker://h/x:1")
    store = bench.again()
    image = store.look_up("docker://h/x:1")
    assert image.diff_ids == (digest("1"), digest("2"))
    assert image.config.env == ("A=1",)
    assert (store.directory(digest("1")) / "file").read_text() == "1"
    (info,) = store.list_images()
    assert info.names == ("docker://h/x:1",)
    assert info.bytes == 200


def test_an_image_is_found_by_id_and_by_its_beginning(bench: Bench) -> None:
    image = bench.image("a", "1")
    for text in (image.id, "a" * 64, "a" * 12, f"store:{image.id}"):
        assert bench.store.look_up(text).id == image.id
    for text in ("a" * 11, "b" * 12, "docker://h/x:1"):
        with pytest.raises(ImageUnknown):
            bench.store.look_up(text)


def test_a_beginning_that_two_images_share_is_refused(bench: Bench) -> None:
    for end in "12":
        image = Image(f"sha256:{'c' * 63}{end}", (digest(end),), ImageConfig(), "", "", "", 1)
        bench.layer(end)
        bench.store.save_image(image, None)
    with pytest.raises(ImageUnknown):
        bench.store.look_up("c" * 12)


def test_a_name_moves_to_another_image_and_the_first_stays_without_one(bench: Bench) -> None:
    first = bench.image("a", "1", "docker://h/x:1")
    second = bench.image("b", "2", "docker://h/x:1")
    assert bench.store.look_up("docker://h/x:1").id == second.id
    gone, freed = bench.store.prune(named=False)
    assert [image.id for image in gone] == [first.id]
    assert freed == 100
    assert bench.layers == ["2"]


def test_layers_that_images_share_go_with_the_last(bench: Bench) -> None:
    bench.image("a", "12", "x")
    bench.image("b", "13", "y")
    bench.store.forget("x")
    bench.store.sweep()
    assert bench.layers == ["1", "3"]
    bench.store.forget("y")
    bench.store.sweep()
    assert bench.layers == []


def test_one_of_two_names_goes_alone(bench: Bench) -> None:
    bench.image("a", "1", "x")
    bench.image("a", "1", "y")
    bench.store.forget("x")
    assert bench.store.look_up("y").id == digest("a")
    bench.store.forget(digest("a"))
    with pytest.raises(ImageUnknown):
        bench.store.look_up("y")


def test_what_a_container_uses_is_kept_also_by_the_next_server(bench: Bench, tmp_path: Path) -> None:
    image = bench.image("a", "1", "x")
    bench.store.hold("box", tmp_path, bench.store.use(image, "x"))
    bench.again().hold_again("box", tmp_path)
    with pytest.raises(ImageInUse, match="1 containers"):
        bench.store.forget("x")
    assert bench.store.prune(named=True) == ([], 0)
    assert bench.store.list_images()[0].in_use == 1
    used = bench.store.held_by("box")
    assert used is not None
    assert (used.name, used.bytes, used.config.env) == ("x", 100, ("A=1",))
    bench.store.let_go("box")
    assert bench.store.prune(named=True)[1] == 100


def test_a_container_takes_its_sidecars_images_along(bench: Bench, tmp_path: Path) -> None:
    image = bench.image("a", "1", "x")
    for owner in ("box", "box/p", "boxer"):
        (tmp_path / owner).mkdir()
        bench.store.hold(owner, tmp_path / owner, bench.store.use(image, "x"))
    bench.store.let_go("box")
    assert bench.store.list_images()[0].in_use == 1


def test_a_layer_in_use_outlives_its_image(bench: Bench, tmp_path: Path) -> None:
    """A tag that moved leaves containers of the former image."""
    image = bench.image("a", "1", "x")
    bench.store.hold("box", tmp_path, bench.store.use(image, "x"))
    (bench.root / "images" / f"{'a' * 64}.json").unlink()
    bench.again().hold_again("box", tmp_path)
    bench.store.sweep()
    assert bench.layers == ["1"]


def test_a_pinned_layer_is_not_swept(bench: Bench) -> None:
    bench.layer("1")
    with bench.store.pinned([digest("1")]):
        assert bench.store.sweep() == 0
    assert bench.store.sweep() == 100


def test_collection_takes_what_was_unused_for_longest_and_no_more(bench: Bench) -> None:
    images = [bench.image(letter, number, letter) for letter, number in ("a1", "b2", "c3")]
    for image in (images[1], images[2], images[0]):
        bench.store.use(image, "x")
    gone, freed = bench.store.prune(named=True, above_bytes=250)
    assert ([image.id for image in gone], freed) == ([digest("b")], 100)


def test_the_last_use_is_known_to_the_next_server(bench: Bench) -> None:
    first, second = bench.image("a", "1", "x"), bench.image("b", "2", "y")
    bench.store.use(first, "x")
    assert [image.id for image in bench.again().list_images()] == [first.id, second.id]


def test_a_layer_of_another_boot_counts_only_if_it_was_written_out(bench: Bench) -> None:
    """After a power cut its files may be empty."""
    bench.layer("1", boot="another")
    bench.layer("2", boot="another")
    bench.store.written_out([digest("2")])
    bench.again()
    assert bench.layers == ["2"]


def test_an_image_without_all_its_layers_is_none(bench: Bench) -> None:
    bench.image("a", "12", "x")
    shutil.rmtree(bench.store.directory(digest("1")).parent)
    with pytest.raises(ImageUnknown):
        bench.again().look_up("x")
    assert not list((bench.root / "names").iterdir())


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"id": 5}', "\0"])
def test_a_spoilt_file_costs_what_it_describes(bench: Bench, content: str) -> None:
    bench.image("a", "1", "x")
    bench.image("b", "2", "y")
    (bench.root / "images" / f"{'a' * 64}.json").write_text(content)
    store = bench.again()
    assert [image.id for image in store.list_images()] == [digest("b")]
    (bench.root / "layers" / ("2" * 64) / "layer.json").write_text(content)
    assert bench.again().list_images() == []


def test_what_was_half_done_is_thrown_away(bench: Bench) -> None:
    with bench.store.staging() as staged:
        (staged / "fs").mkdir()
        bench.again()
        assert not staged.exists()


def test_directories_are_given_once_and_none_below_one_that_hides_all(bench: Bench) -> None:
    for letter in "1245":
        bench.layer(letter)
    with bench.store.staging() as staged:
        (staged / "fs").mkdir()
        bench.store.commit_layer(staged, Layer(digest("3"), 1, read_boot_id(), hides_lower=True))
    for wanted, found in (
        ("12", "12"),
        ("121", "21"),
        ("1324", "324"),
        ("13", "3"),
        ("31", "31"),
        ("1334345", "345"),
    ):
        directories = bench.store.directories(map(digest, wanted))
        assert "".join(path.parent.name[0] for path in directories) == found


def test_a_second_commit_of_a_layer_changes_nothing(bench: Bench) -> None:
    bench.layer("1", 100)
    bench.layer("1", 999)
    assert bench.store.layer_bytes([digest("1")]) == 100


def test_passwords_are_told_apart_and_not_kept(bench: Bench) -> None:
    one, other = RegistryAuth("me", "geheim"), RegistryAuth("me", "secret")
    prints = {bench.store.fingerprint(each) for each in (one, other, None)}
    assert len(prints) == 3
    assert bench.again().fingerprint(one) in prints
    everything = json.dumps([path.read_text() for path in bench.root.rglob("*") if path.is_file()])
    assert "geheim" not in everything
    assert bench.store.fingerprint(RegistryAuth("m", "egeheim")) not in prints
