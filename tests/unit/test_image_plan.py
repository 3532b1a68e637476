"""What is made of manifests, configs, settings and failures that come from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from garden_py.backend.images.config import parse_config
from garden_py.backend.images.fetch import Failed
from garden_py.backend.images.plan import LAYERS_MAX, plan_of
from garden_py.backend.images.proxy import ProxyFailed, Source
from garden_py.backend.images.puller import _describe, _essence
from garden_py.backend.images.sources import sources_of
from garden_py.backend.linux.processes import run_from_image
from garden_py.config import load_config
from garden_py.model import errors
from garden_py.model.image import ImageConfig, PullProgress, RegistryAuth, parse_image
from garden_py.model.process import ProcessSpec

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def told(layers: int = 1, **changes: Any) -> dict[str, Any]:
    blob = {"digest": TWO, "size": 5, "mediaType": "m"}
    return {
        "manifest": {"config": {"digest": ONE}, "layers": [blob] * layers},
        "config": {"rootfs": {"diff_ids": [ONE] * layers}},
        **changes,
    }


def test_a_plan_fetches_each_layer_once() -> None:
    plan = plan_of("x", told(3))
    assert plan.diff_ids == (ONE, ONE, ONE)
    assert [number for number, _ in plan.distinct()] == [0]


@pytest.mark.parametrize(
    "bad",
    [
        told(0),
        told(LAYERS_MAX + 1),
        told(manifest={}),
        told(manifest=[]),
        told(manifest={"config": {"digest": ONE}, "layers": None}),
        told(manifest={"config": {"digest": ONE}, "layers": ["x"]}),
        told(manifest={"config": {"digest": ONE}, "layers": [{"digest": TWO, "size": -1}]}),
        told(manifest={"config": {"digest": ONE}, "layers": [{"digest": TWO, "size": "5"}]}),
        told(manifest={"config": {"digest": ONE}, "layers": [{"digest": "sha256:../../etc", "size": 5}]}),
        told(manifest={"config": {"digest": "../x"}, "layers": [{"digest": TWO, "size": 5}]}),
        told(config={"rootfs": {"diff_ids": []}}),
        told(config={"rootfs": {"diff_ids": ["../../x"]}}),
        told(config={"rootfs": {"diff_ids": [5]}}),
        told(config={}),
    ],
)
def test_a_manifest_that_describes_no_layers_is_invalid(bad: dict[str, Any]) -> None:
    with pytest.raises(errors.ImageInvalid):
        plan_of("x", bad)


def test_of_a_manifest_only_what_is_read_crosses() -> None:
    """The rest may be of any depth, which would end the reader of it."""
    deep: Any = []
    for _ in range(3000):
        deep = [deep]
    blob = {"digest": TWO, "size": 5, "mediaType": "m", "annotations": deep}
    manifest = {"config": {"digest": ONE}, "layers": [blob], "deep": deep}
    config = {"rootfs": {"diff_ids": [ONE]}, "config": {"Env": ["A=1"], "deep": deep}, "history": deep}
    found = _essence(TWO, manifest, config)
    json.loads(json.dumps(found))
    assert plan_of("x", found).diff_ids == (ONE,)
    assert parse_config(found["config"])["config"].env == ("A=1",)
    for bad in ([], {"layers": 5, "config": {}}, {"layers": [5], "config": {"digest": ONE}}):
        with pytest.raises((AttributeError, TypeError, KeyError)):
            _essence(TWO, bad, config)  # type: ignore[arg-type]


def test_a_config_may_say_anything() -> None:
    parsed = parse_config(
        {
            "architecture": 5,
            "os": "linux",
            "config": {
                "Env": ["A=1", "no equals", "=x", 5, "B=\0"],
                "User": ["x"],
                "Entrypoint": "text",
                "Cmd": ["sh", None, "-c"],
                "Labels": {"a": "1", "b": 2},
            },
        }
    )
    assert parsed["config"] == ImageConfig(env=("A=1",), cmd=("sh", "-c"), labels=(("a", "1"), ("b", "")))
    assert (parsed["architecture"], parsed["os"]) == ("", "linux")
    for nonsense in ({}, {"config": None}, {"config": []}, {"config": {"Labels": []}}):
        assert parse_config(nonsense)["config"] == ImageConfig()


def sources(image: str, auth: RegistryAuth | None = None, **settings: Any) -> list[Any]:
    return sources_of(parse_image(image), auth, load_config(settings, environ={}))


def test_the_registry_itself_is_asked_last_and_each_gets_the_password() -> None:
    found = sources(
        "docker://reg.example/a/b:1",
        RegistryAuth("me", "pw"),
        registry={
            "reg.example": {"mirrors": ["m.example:5000", "n.example/cache/"], "ca": "/ca.pem"},
            "m.example:5000": {"plain_http": True},
        },
    )
    assert [(each.image, each.host, each.insecure, each.ca) for each in found] == [
        ("docker://m.example:5000/a/b:1", "m.example:5000", True, ""),
        ("docker://n.example/cache/a/b:1", "n.example", False, ""),
        ("docker://reg.example/a/b:1", "reg.example", False, "/ca.pem"),
    ]
    assert {(each.username, each.password) for each in found} == {("me", "pw")}


def test_another_registry_may_stand_for_docker_hub() -> None:
    (found,) = sources(
        "docker:///busybox#1", docker_registry="hub.local:5000", insecure_registry=["hub.local:5000"]
    )
    assert (found.image, found.insecure) == ("docker://hub.local:5000/library/busybox:1", True)


def test_digests_and_local_images() -> None:
    assert sources(f"docker://h.x/r@{ONE}")[0].image == f"docker://h.x/r@{ONE}"
    assert sources("oci:///a/b:t")[0].image == "oci:/a/b:t"
    assert sources("docker-archive:///a/b")[0].image == "docker-archive:/a/b"


def test_unknown_registry_settings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "garden.toml"
    file.write_text('[registry."h:1"]\nmirror = ["x"]\n')
    with pytest.raises(errors.InvalidRequest, match="registry"):
        load_config({}, file=file, environ={})


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("reading manifest v1 in h/x: manifest unknown: manifest unknown", "missing"),
        ("reading manifest 1 in h/x: unauthorized: authentication required", "denied"),
        ("unable to retrieve auth token: invalid username/password: unauthorized: incorrect", "denied"),
        ("requested access to the resource is denied", "denied"),
        ('no descriptor found for reference "x"', "missing"),
        ("open /nope/index.json: no such file or directory", "missing"),
        (
            'pinging container registry h: Get "https://h/v2/": dial tcp: connect: connection refused',
            "unreachable",
        ),
        ("its manifest is not JSON: x", "invalid"),
    ],
)
def test_refusals_of_registries_are_told_apart(message: str, kind: str) -> None:
    assert (
        _describe(ProxyFailed(message), Source("docker://hub.example/x:v1", host="hub.example"))["kind"]
        == kind
    )


def test_names_are_not_taken_for_reasons() -> None:
    """Nor what a mirror had said for what the registry says."""
    refused = 'pinging container registry h: Get "https://h/v2/": dial tcp: connect: connection refused'
    source = Source("docker://hub.example/corrupted/not-found:unauthorized", host="hub.example")
    error = ProxyFailed(f"reading manifest unauthorized in hub.example/corrupted/not-found: {refused}")
    error.add_note("mirror: manifest unknown")
    found = _describe(error, source)
    assert found["kind"] == "unreachable"
    assert "manifest unknown" in found["message"]


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ({"kind": "denied", "message": "m"}, errors.ImageAccessDenied),
        ({"kind": "missing", "message": "m"}, errors.ImageNotFound),
        ({"kind": "unreachable", "message": "m"}, errors.ImageUnreachable),
        ({"kind": "invalid", "message": "m"}, errors.ImageInvalid),
        ({"kind": "image_invalid", "message": "m"}, errors.ImageInvalid),
        (
            {"kind": "image_too_large", "message": "m", "facts": {"limit": "max_entries"}},
            errors.ImageTooLarge,
        ),
        ({"kind": "no_skopeo", "message": "m"}, errors.NotSupported),
        ({"kind": "no_space", "message": "m"}, errors.HostFault),
        ({"kind": "something new", "message": "m"}, errors.HostFault),
        ({}, errors.HostFault),
    ],
)
def test_failures_become_typed_errors(facts: dict[str, Any], error: type[Exception]) -> None:
    found = Failed(facts).as_garden_error("docker://h/x:1", "spec.image")
    assert type(found) is error
    if isinstance(found, errors.ImageTooLarge):
        assert found.flag == "--image-max-entries"


def test_a_process_of_the_image() -> None:
    image = ImageConfig(entrypoint=("/app", "-v"), cmd=("serve",), user="1000", working_dir="/srv")
    run = run_from_image(ProcessSpec("", from_image=True), image)
    assert (run.path, run.args, run.user, run.dir) == ("/app", ("-v", "serve"), "1000", "/srv")
    run = run_from_image(ProcessSpec("", args=("x",), user="root", dir="/tmp", from_image=True), image)
    assert (run.path, run.args, run.user, run.dir) == ("/app", ("-v", "x"), "root", "/tmp")
    run = run_from_image(ProcessSpec("", from_image=True), ImageConfig(cmd=("sh", "-c", "x")))
    assert (run.path, run.args) == ("sh", ("-c", "x"))
    with pytest.raises(errors.InvalidField, match="neither"):
        run_from_image(ProcessSpec("", from_image=True), ImageConfig())


def test_progress_in_words() -> None:
    assert str(PullProgress("resolving")) == "resolving image"
    assert str(PullProgress("pulling", 3, 1, 100, 7)) == "pulling image: 1 of 3 layers, 7 of 100 bytes"
