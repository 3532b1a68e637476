"""References to images: what each form means, and what is none."""

import pytest

from garden_py.model.codec import dump_container_spec, dump_process_spec, load_process_spec
from garden_py.model.image import (
    BadReference,
    ExtraLayer,
    ImageRef,
    RegistryAuth,
    Transport,
    image_problem,
    parse_image,
)
from garden_py.model.process import ProcessSpec, Sidecar
from garden_py.model.spec import ContainerSpec

_DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/srv/root", ImageRef(Transport.PATH, path="/srv/root")),
        ("raw:///srv/root", ImageRef(Transport.PATH, path="/srv/root")),
        ("file:///srv/root.tar", ImageRef(Transport.PATH, path="/srv/root.tar")),
        ("raw:/srv/root", ImageRef(Transport.PATH, path="/srv/root")),
        ("/srv/a:b", ImageRef(Transport.PATH, path="/srv/a:b")),
        ("oci:///srv/layout:v1", ImageRef(Transport.OCI, path="/srv/layout", tag="v1")),
        ("oci:///srv/layout", ImageRef(Transport.OCI, path="/srv/layout")),
        ("oci:/srv/layout:a/b:1", ImageRef(Transport.OCI, path="/srv/layout", tag="a/b:1")),
        ("oci-archive:///srv/x.tar:v1", ImageRef(Transport.OCI_ARCHIVE, path="/srv/x.tar", tag="v1")),
        ("docker-archive:/srv/x.tar:r/n:1", ImageRef(Transport.DOCKER_ARCHIVE, path="/srv/x.tar", tag="r/n:1")),
        ("docker:///busybox", ImageRef(Transport.REGISTRY, host="docker.io", name="library/busybox", tag="latest")),
        ("docker:///busybox#1.36", ImageRef(Transport.REGISTRY, host="docker.io", name="library/busybox", tag="1.36")),
        ("docker:///o/r:2", ImageRef(Transport.REGISTRY, host="docker.io", name="o/r", tag="2")),
        ("docker://o/r:2", ImageRef(Transport.REGISTRY, host="docker.io", name="o/r", tag="2")),
        ("docker://reg.example/o/r#2", ImageRef(Transport.REGISTRY, host="reg.example", name="o/r", tag="2")),
        ("docker://localhost:5000/r", ImageRef(Transport.REGISTRY, host="localhost:5000", name="r", tag="latest")),
        ("docker://localhost/r", ImageRef(Transport.REGISTRY, host="localhost", name="r", tag="latest")),
        ("docker://[::1]:5000/r:1", ImageRef(Transport.REGISTRY, host="[::1]:5000", name="r", tag="1")),
        ("docker://h:1/r:t@" + _DIGEST, ImageRef(Transport.REGISTRY, host="h:1", name="r", digest=_DIGEST)),
        ("docker://index.docker.io/r#1", ImageRef(Transport.REGISTRY, host="docker.io", name="library/r", tag="1")),
        ("store:tool", ImageRef(Transport.STORE, name="tool:latest")),
        ("store:a/tool:2", ImageRef(Transport.STORE, name="a/tool:2")),
        ("store:" + _DIGEST, ImageRef(Transport.STORE, name=_DIGEST)),
    ],
)  # fmt: skip
def test_forms(text, wanted):
    found = parse_image(text)
    assert found == wanted
    assert parse_image(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "busybox",
        "srv/root",
        "raw://srv/root",
        "oci://layout",
        "docker:busybox",
        "docker://",
        "docker:///Busybox",
        "docker:///a..b",
        "docker:///r:",
        "docker:///r:" + "t" * 129,
        "docker:///r@sha256:abc",
        "docker:///r@md5:abc",
        "docker://ho_st.example/r",
        "docker://host:port/r",
        "docker:///" + "a" * 256,
        "docker:///../etc",
        "store:",
        "store:UPPER",
        "store:../x",
        "http://x/y",
        "docker://me:geheim@h.example/r",
        "/a\0b",
        "/" + "a" * 5000,
    ],
)
def test_what_is_none(text):
    with pytest.raises(BadReference):
        parse_image(text)
    assert image_problem(text)


_LAYER = "layer_path=/home/a&layer_digest=" + _DIGEST
_FETCHED = "layer=https%3A%2F%2Fh.example%3A8443%2Fx.tgz%3Fa%3D1%26b%3D%252F"
_URL = "https://h.example:8443/x.tgz?a=1&b=%2F"


@pytest.mark.parametrize(
    ("text", "path", "layer"),
    [
        (f"preloaded+layer:/b.tar?{_FETCHED}&{_LAYER}", "/b.tar", ExtraLayer(_URL, "/home/a", _DIGEST)),
        (f"preloaded+layer:///b.tar?{_LAYER}&{_FETCHED}", "/b.tar", ExtraLayer(_URL, "/home/a", _DIGEST)),
        (
            f"preloaded+layer:/b%20%3F.tar?layer=file:///x%2520y&layer_path=/./a//%C3%BC/&layer_digest={_DIGEST[7:]}",
            "/b ?.tar",
            ExtraLayer("file:///x%20y", "/a/ü", _DIGEST),
        ),
        (
            f"preloaded+layer:/b.tar?layer=http://h/x&layer_path=/&layer_digest={_DIGEST}",
            "/b.tar",
            ExtraLayer("http://h/x", "/", _DIGEST),
        ),
    ],
)
def test_preloaded_tars_with_a_layer(text, path, layer):
    found = parse_image(text)
    assert found == ImageRef(Transport.PRELOADED, path=path, layer=layer)


def test_a_preloaded_tars_name_does_not_say_where_its_layer_comes_from():
    """That may change from one create to the next, and be a secret."""
    found = parse_image(f"preloaded+layer:/b%20.tar?{_FETCHED}&{_LAYER}")
    assert str(found) == f"preloaded+layer:///b%20.tar?{_LAYER}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"preloaded+layer:/b.tar?{_LAYER}", "no query parameter 'layer' found in URL preloaded"),
        ("preloaded+layer:/b.tar", "no query parameter 'layer' found in URL"),
        (f"preloaded+layer:/b.tar?layer=&{_LAYER}", "no query parameter 'layer' found in URL"),
        (f"preloaded+layer:/b.tar?{_FETCHED}&layer_digest=x", "no query parameter 'layer_path' found in URL"),
        (
            f"preloaded+layer:/b.tar?{_FETCHED}&layer_path=/x",
            "no query parameter 'layer_digest' found in URL",
        ),
        (f"preloaded+layer:/b.tar?{_FETCHED}&{_LAYER}&layer_path=/x", "once"),
        (f"preloaded+layer:/b.tar?layer=http://h/?a=1&b=2&{_LAYER}", "b: no parameter"),
        (f"preloaded+layer:/b.tar?{_FETCHED}&{_LAYER}0", "layer_digest"),
        (f"preloaded+layer:/b.tar?{_FETCHED}&layer_path=a&layer_digest={_DIGEST}", "layer_path"),
        (f"preloaded+layer:/b.tar?{_FETCHED}&layer_path=/a/../b&layer_digest={_DIGEST}", "layer_path"),
        (f"preloaded+layer:/b.tar?{_FETCHED}&layer_path=/%00&layer_digest={_DIGEST}", "NUL"),
        (f"preloaded+layer:b.tar?{_FETCHED}&{_LAYER}", "absolute"),
        (f"preloaded+layer://host/b.tar?{_FETCHED}&{_LAYER}", "absolute"),
        (f"preloaded+layer:/b.tar?{_FETCHED}#x&{_LAYER}", "#"),
        (f"preloaded+layer:/b .tar?{_FETCHED}&{_LAYER}", "%XX"),
        (f"preloaded+layer:/b.tar?layer=ftp://h/x&{_LAYER}", "http:"),
        (f"preloaded+layer:/b.tar?layer=http:///x&{_LAYER}", "host"),
        (f"preloaded+layer:/b.tar?layer=http://h:99999/x&{_LAYER}", "URL"),
        (f"preloaded+layer:/b.tar?layer=http://%5B::1/x&{_LAYER}", "URL"),
        (f"preloaded+layer:/b.tar?layer=http://h/%20x%0d%0aHost:y&{_LAYER}", "%XX"),
        (f"preloaded+layer:/b.tar?layer=http://me:geheim@h/x&{_LAYER}", "password"),
        (f"preloaded+layer:/b.tar?layer=file:x&{_LAYER}", "file:///"),
        (f"preloaded+layer:/b.tar?layer=file://h/x&{_LAYER}", "file:///"),
        (f"preloaded+layer:/b.tar?layer=file:///x%2500&{_LAYER}", "NUL"),
    ],
)
def test_preloaded_tars_that_are_none(text, problem):
    assert problem in (image_problem(text) or "")


def test_an_unknown_kind_is_told_the_known_ones():
    assert "docker://host/repo:tag" in (image_problem("ftp://x/y") or "")


def test_passwords_are_neither_written_down_nor_shown():
    auth = RegistryAuth("me", "geheim")
    spec = ContainerSpec(handle="a", image="docker:///x", image_auth=auth)
    process = ProcessSpec("", from_image=True, sidecar=Sidecar("docker:///x", image_auth=auth))
    for text in (
        str(dump_container_spec(spec)),
        str(dump_process_spec(process)),
        repr(spec),
        repr(process),
    ):
        assert "geheim" not in text
    again = load_process_spec(dump_process_spec(process))
    assert again.sidecar is not None
    assert again.sidecar.image_auth is None
    assert again.from_image
